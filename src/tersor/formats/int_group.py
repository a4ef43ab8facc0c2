"""Integer grids with one scale per group of neighbouring columns: `int4-g128`, `int8`, `int3-g32-asym`, ...

The uniform affine quantizer (Jacob et al. 2017, https://arxiv.org/abs/1712.05877) with group-wise scales
(Shen et al. 2019, Q-BERT, https://arxiv.org/abs/1909.05840):

    weight = (code - zero_point) * scale

Without a group size, one scale serves a whole output row (per channel). The last group of a row may be shorter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.contract import Encoded, Grid, Layout, Packing, Params, Projector, UsualMethods, Weight
from tersor.formats.packing import grouped, pack, packed_width, ungrouped, unpack
from tersor.formats.trainable import LearnableRange, Trainable, byte, half
from tersor.formats.views import IntegerView

# Suffixes: o output row, g group, k column within the group.


@dataclass(frozen=True)
class IntGroup(Grid):
    """A `bits`-bit integer grid per output row and group of `group_size` columns.

    Parts:
        codes: packed unsigned codes `[out, ceil(in * bits / 8)]` uint8 (`int8` symmetric: the signed codes, int8).
        scale: `[out, groups]` fp16. Below 8 bits it may be negative: the weight of largest magnitude then lands on the
            grid's longer end, `-2**(bits-1)`. 8-bit codes keep to -127..127, which int8 kernels want.
        zero_point: `[out, groups]` uint8, asymmetric grids only: a fixed-point code in units of `2**bits / 256` steps.
            Integer zero points are the multiples of `256 / 2**bits`.

    >>> int4 = IntGroup(bits=4, group_size=2)
    >>> weight = torch.tensor([[0.1, -0.8, 0.3, 0.2]])
    >>> int4.fake_quantize(weight, int4.fit(weight)).mul(10).round(decimals=1)
    tensor([[ 1.0000, -8.0000,  3.0000,  1.9000]])
    >>> int4.name, int4.encode(weight, int4.fit(weight)).parts["codes"].shape
    ('int4-g2', torch.Size([1, 2]))
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    rows_independent = True
    usual_methods = UsualMethods("nearest", "mse", "gptq")

    @property
    def name(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"

    @property
    def asymmetric_range(self) -> bool:
        return self.symmetric and self.bits < 8

    @property
    def trainable_parts(self) -> Mapping[str, Trainable]:
        scale = {"scale": Trainable(half)}
        return scale if self.symmetric else {**scale, "zero_point": Trainable(byte)}

    @property
    def learnable_range(self) -> LearnableRange:
        lowest, highest, middle = self.lowest_code, 2.0**self.bits - 1, 2.0 ** (self.bits - 1)
        if self.symmetric:
            return LearnableRange(lowest, highest, 2.0**self.bits, middle - 1, middle, self.group_size)
        return LearnableRange(lowest, highest, 2.0**self.bits, highest, None, self.group_size)

    @property
    def lowest_code(self) -> float:
        """8-bit codes of a symmetric grid keep to -127..127, and leave the lowest unused."""
        return 1.0 if self.bits == 8 and self.symmetric else 0.0

    def num_groups(self, num_columns: int) -> int:
        return -(-num_columns // self.group_size) if self.group_size else 1

    def layout(self, shape: tuple[int, int]) -> Layout:
        num_rows, num_columns = shape
        groups = (num_rows, self.num_groups(num_columns))
        layout: Layout = {"codes": (torch.uint8, (num_rows, packed_width(num_columns, self.bits)))}
        if self.bits == 8 and self.symmetric:
            layout["codes"] = (torch.int8, shape)
        layout["scale"] = (torch.float16, groups)
        if not self.symmetric:
            layout["zero_point"] = (torch.uint8, groups)
        return layout

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {"codes": (self.bits, shape[1])} if self.bits < 8 else {}

    def as_integers(self, encoded: Encoded) -> IntegerView:
        parts = encoded.parts
        codes, scale, zero = parts["codes"], parts["scale"], parts.get("zero_point")
        return IntegerView(self.bits, self.group_size, encoded.shape, codes, scale, zero)

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """The grid that spans the weights' range (absmax), or `shrink` times it: a number, or one per group
        `[out, groups]`. Raises FormatError where a scale overflows fp16."""
        w_ogk = self.grouped(weight)
        if not self.symmetric:
            # Zero stays inside the range, so that the zero point fits on the grid.
            low, high = w_ogk.amin(-1).clamp(max=0) * shrink, w_ogk.amax(-1).clamp(min=0) * shrink
            scale = self.storable((high - low) / (2**self.bits - 1))
            return {"scale": scale, "zero_point": self.zero_point_code(-low / self.divisor(scale))}
        largest, smallest = w_ogk.amax(-1), w_ogk.amin(-1)
        if self.bits == 8:
            return {"scale": self.storable(torch.maximum(largest, -smallest) * shrink / 127)}
        extreme = torch.where(largest > -smallest, largest, smallest)
        return {"scale": self.storable(extreme * shrink / -(2 ** (self.bits - 1)))}

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return self.dequantize(self.quantize(weight, params), params)

    def encode(self, weight: Weight, params: Params) -> Encoded:
        codes = self.quantize(weight, params)
        if self.bits == 8 and self.symmetric:
            codes = (codes - 128).to(torch.int8)
        else:
            codes = pack(codes.to(torch.uint8), self.bits)
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"codes": codes, **params})

    def decode(self, encoded: Encoded) -> Weight:
        codes = encoded.parts["codes"]
        if codes.dtype is torch.int8:
            return self.dequantize(codes.float() + 128, encoded.parts)
        return self.dequantize(unpack(codes, self.bits, encoded.shape[1]).float(), encoded.parts)

    # What methods that choose better grids build on.

    @property
    def integer_bits(self) -> int:
        return self.bits

    def rescaled(self, params: Params, factor: Float[Tensor, "out groups"]) -> Params:
        return {**params, "scale": self.storable(params["scale"].float() * factor)}

    def refit(self, weight: Weight, params: Params, importance: Float[Tensor, " in"]) -> Params:
        """The scale that fits the weights best to the codes they have now: `<w, q> / <q, q>` per group."""
        q_ogk = self.grouped(self.quantize(weight, params)) - self.zero_point(params)
        hq_ogk = q_ogk * self.grouped(importance.expand_as(weight))
        energy = (hq_ogk * q_ogk).sum(-1)
        scale = (hq_ogk * self.grouped(weight)).sum(-1) / torch.where(energy == 0, 1.0, energy)
        return {**params, "scale": torch.where(energy == 0, params["scale"].float(), scale).half()}

    def grouped(self, weight: Weight) -> Float[Tensor, "o g k"]:
        """The last group ends in zeros where the columns do not fill it."""
        return grouped(weight, self.group_size or weight.shape[1])

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        lowest, highest = self.lowest_code, 2.0**self.bits - 1
        group_size = self.group_size or shape[1]
        scale_go = params["scale"].float().t().contiguous()
        divisor_go = self.divisor(params["scale"]).t().contiguous()
        zero = self.zero_point(params)
        zero_go = torch.full_like(scale_go, zero) if isinstance(zero, float) else zero.squeeze(-1).t().contiguous()

        def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
            g = j // group_size
            codes = (values / divisor_go[g]).add_(zero_go[g]).clamp_(lowest, highest).round_()
            return codes.sub_(zero_go[g]).mul_(scale_go[g])

        return project

    def quantize(self, weight: Weight, params: Params) -> Float[Tensor, "out in"]:
        """The nearest unsigned codes, as floats."""
        codes = self.grouped(weight) / self.divisor(params["scale"]).unsqueeze(-1) + self.zero_point(params)
        # Clamped first, for rounding then leaves no negative zero, which a stored code could not tell.
        return ungrouped(codes.clamp_(self.lowest_code, 2**self.bits - 1).round_(), weight.shape[1])

    def dequantize(self, codes: Float[Tensor, "out in"], params: Params) -> Weight:
        scale = params["scale"].float().unsqueeze(-1)
        return ungrouped((self.grouped(codes) - self.zero_point(params)) * scale, codes.shape[1])

    def zero_point(self, params: Params) -> Tensor | float:
        """The zero point in units of one step: half the grid, or the one stored for each group `[out, groups, 1]`."""
        if self.symmetric:
            return float(2 ** (self.bits - 1))
        return params["zero_point"].float().unsqueeze(-1) * (2**self.bits / 256)

    def zero_point_code(self, zero_point: Float[Tensor, "out groups"]) -> Tensor:
        """The fixed-point code nearest to a zero point, which is given in steps of the scale."""
        return (zero_point * (256 / 2**self.bits)).round().clamp(0, 255).to(torch.uint8)

    def storable(self, scale: Float[Tensor, "out groups"]) -> Tensor:
        largest = scale.abs().max().item()
        if not largest <= torch.finfo(torch.float16).max:
            raise FormatError(f"{self.name}: a scale of {largest:.3g} overflows fp16; keep this weight in bf16")
        return scale.half()

    @staticmethod
    def divisor(scale: Tensor) -> Tensor:
        """The stored scale in float32; where it is zero (a group of zeros), one."""
        scale = scale.float()
        return torch.where(scale == 0, 1.0, scale)


CHUNK = 2**18  # weights searched at a time: what a core's cache holds


def by_rows(weight: Weight, search: Callable[[Weight], Params]) -> Params:
    """Run a parameter search on a few rows at a time; rows of an integer grid are independent."""
    num_rows = max(1, CHUNK // weight.shape[1])
    found = [search(rows) for rows in weight.split(num_rows)]
    return {name: torch.cat([params[name] for params in found]) for name in found[0]}
