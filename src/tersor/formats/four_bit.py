"""Four-bit weights: one of sixteen levels, times the scale of its group. What NF4, MXFP4 and NVFP4 share.

Two codes per byte. They differ in their levels, in how a scale is stored, and in which half of a byte comes first.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersor.formats.contract import Encoded, Grid, Layout, Packing, Params, Projector, UsualMethods, Weight
from tersor.formats.packing import grouped, packed_width, ungrouped
from tersor.formats.views import FloatView


@dataclass(frozen=True, eq=False)
class Levels:
    """The values that codes stand for.

    Attributes:
        of_code: the value of each of the 16 codes `[16]` float32.
        sorted: the values that are written, ascending `[n]` float32.
        codes: their codes `[n]` uint8.
        ends: `[n - 1]` float32; above `ends[i]`, `sorted[i + 1]` is nearer than `sorted[i]`.
    """

    of_code: Tensor
    sorted: Tensor
    codes: Tensor
    ends: Tensor

    @classmethod
    def of(cls, of_code: Sequence[float], ties_to_even: bool = False) -> "Levels":
        """Halfway between two levels, the lower is taken; with `ties_to_even`, the one with the even code. Of codes for
        the same value the first is written."""
        values = torch.tensor(of_code)
        codes = [code for code, value in enumerate(of_code) if value not in of_code[:code]]
        codes.sort(key=of_code.__getitem__)
        levels = values[codes]
        ends = (levels[:-1] + levels[1:]) / 2
        if ties_to_even:
            upper_is_even = torch.tensor(codes[1:]) % 2 == 0
            ends = torch.where(upper_is_even, torch.nextafter(ends, torch.tensor(-torch.inf)), ends)
        return cls(values, levels, torch.tensor(codes, dtype=torch.uint8), ends)

    def nearest(self, steps: Tensor) -> UInt8[Tensor, "..."]:
        """Positions in `sorted` of the levels nearest to these values. For many values, faster than `bucketize`."""
        position = torch.zeros(steps.shape, dtype=torch.uint8, device=steps.device)
        for end in self.ends.tolist():
            position += steps > end
        return position


class FourBit(Grid):
    """Weights `level * scale`. A subclass says which levels, and how the scales of the groups are stored.

    Groups are neighbouring columns of one row; the last group of a row may be shorter.

    Parts:
        codes: `[out, ceil(in / 2)]` uint8; the half of a last byte that no column fills is zero.
        The scales, see the subclasses.
    """

    rows_independent = True
    usual_methods = UsualMethods("nearest", "mse", "gptq")
    learnable_range = None
    element: ClassVar[str]  # of FloatView
    group_size: ClassVar[int]
    levels: ClassVar[Levels]
    asymmetric_range = False
    first_in_high_half = False

    @abstractmethod
    def scale_layout(self, groups: tuple[int, int]) -> Layout:
        """The parts beside the codes, for `groups = (out, groups)`: the scales first, and what scales them."""

    @abstractmethod
    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params: ...

    @abstractmethod
    def scale(self, params: Params) -> Float[Tensor, "out groups"]:
        """The scales that the stored ones stand for, float32."""

    def layout(self, shape: tuple[int, int]) -> Layout:
        num_rows, num_columns = shape
        codes: Layout = {"codes": (torch.uint8, (num_rows, packed_width(num_columns, 4)))}
        return codes | self.scale_layout((num_rows, -(-num_columns // self.group_size)))

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> FloatView:
        scale, *others = self.scale_layout((1, 1))
        nested, parts = {name: encoded.parts[name] for name in others}, encoded.parts
        return FloatView(self.element, self.group_size, encoded.shape, parts["codes"], parts[scale], nested)

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        w_ogk, scale = self.grouped(weight), self.scale(params).unsqueeze(-1)
        nearest = self.levels.nearest(w_ogk / divisor(scale))
        return ungrouped(lookup(self.levels.sorted, nearest).mul_(scale), weight.shape[1])

    def encode(self, weight: Weight, params: Params) -> Encoded:
        nearest = self.levels.nearest(self.grouped(weight) / divisor(self.scale(params)).unsqueeze(-1))
        codes = ungrouped(lookup(self.levels.codes, nearest), weight.shape[1])
        pairs = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(-1)
        high, low = pairs if self.first_in_high_half else pairs[::-1]
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"codes": high << 4 | low, **params})

    def decode(self, encoded: Encoded) -> Weight:
        codes = encoded.parts["codes"]
        # Both weights of a byte are looked up at once.
        bytes_ = torch.arange(256, device=codes.device)
        halves = (bytes_ >> 4, bytes_ & 15) if self.first_in_high_half else (bytes_ & 15, bytes_ >> 4)
        pairs = self.levels.of_code.to(codes.device)[torch.stack(halves, dim=-1)]
        steps = torch.nn.functional.embedding(codes.int(), pairs).flatten(1)[:, : encoded.shape[1]]
        return ungrouped(self.grouped(steps) * self.scale(encoded.parts).unsqueeze(-1), encoded.shape[1])

    def grouped(self, weight: Weight) -> Float[Tensor, "out groups k"]:
        """The last group ends in zeros where the columns do not fill it."""
        return grouped(weight, self.group_size)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        scale_go = self.scale(params).t().contiguous()
        divisor_go = divisor(scale_go)
        levels, ends = self.levels.sorted.to(scale_go.device), self.levels.ends.to(scale_go.device)

        def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
            g = j // self.group_size
            return levels[torch.bucketize(values / divisor_go[g], ends, out_int32=True)].mul_(scale_go[g])

        return project


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` for a table of numbers, without the cost of general indexing."""
    return table.to(index.device).index_select(0, index.flatten().int()).view(index.shape)


def divisor(scale: Tensor) -> Tensor:
    """The scale to divide by; where it is zero (a group of zeros), one."""
    return torch.where(scale == 0, 1.0, scale)
