"""NF4, 4-bit NormalFloat, plain and with double quantization (Dettmers et al. 2023, QLoRA,
https://arxiv.org/abs/2305.14314).

Sixteen levels that gaussian weights use about equally often, in blocks of 64 scaled by their largest magnitude. Levels,
code order and byte order are those of bitsandbytes; where 64 divides `in` its blocks are ours, and the parts,
flattened, are its tensors. It cuts other matrices across their rows, which is not done here: a row may end in a shorter
block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.core.threads import mean
from tersor.formats.contract import Layout, Params, Weight
from tersor.formats.four_bit import FourBit, Levels, divisor
from tersor.formats.trainable import Trainable, single

NORMAL_FLOAT = Levels.of(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
BLOCK = 256  # scales that share a scale of their own


@dataclass(frozen=True)
class Nf4(FourBit):
    """Blocks of 64 with a float32 scale.

    Parts:
        codes: the position of the level, the first of a byte in the high half.
        absmax: `[out, ceil(in / 64)]` float32.

    >>> weight = torch.tensor([[0.5, -2.0, 0.1, 1.5]])
    >>> Nf4().fake_quantize(weight, Nf4().fit(weight))
    tensor([[ 0.4922, -2.0000,  0.1592,  1.4459]])
    """

    name = "nf4"
    element = "nf4"
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {"absmax": Trainable(single)}
    group_size = 64
    levels = NORMAL_FLOAT
    asymmetric_range = True
    first_in_high_half = True

    def scale_layout(self, groups: tuple[int, int]) -> Layout:
        return {"absmax": (torch.float32, groups)}

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        return {"absmax": self.largest(weight, shrink)}

    def scale(self, params: Params) -> Float[Tensor, "out groups"]:
        return params["absmax"]

    def largest(self, weight: Weight, shrink: float | Tensor) -> Float[Tensor, "out groups"]:
        return (self.grouped(weight).abs().amax(-1) * shrink).clamp(max=torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Nf4Double(FourBit):
    """NF4 whose scales are 8-bit themselves: those of the whole matrix, row by row, in blocks of 256.

    A scale is `level(absmax) * nested_absmax + offset`, with the 256 levels of `dynamic_levels`.

    Parts:
        codes: as of `nf4`.
        absmax: `[out, ceil(in / 64)]` uint8.
        nested_absmax: `[ceil(out * ceil(in / 64) / 256)]` float32.
        offset: `[1]` float32, the mean of the scales.
    """

    name = "nf4-dq"
    element = "nf4"
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {
        "nested_absmax": Trainable(single),
        "offset": Trainable(single),
    }
    group_size = 64
    levels = NORMAL_FLOAT
    asymmetric_range = True
    first_in_high_half = True
    rows_independent = False

    def scale_layout(self, groups: tuple[int, int]) -> Layout:
        return {
            "absmax": (torch.uint8, groups),
            "nested_absmax": (torch.float32, (-(-groups[0] * groups[1] // BLOCK),)),
            "offset": (torch.float32, (1,)),
        }

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """Raises FormatError where the sum of the scales overflows float32."""
        absmax = Nf4().largest(weight, shrink)
        offset = mean(absmax)
        if not offset.isfinite():
            raise FormatError(f"{self.name}: the sum of the scales overflows float32; use nf4")
        blocks = blocked(absmax - offset)
        nested = blocks.abs().amax(-1)
        levels = dynamic_levels().to(weight.device)
        codes = torch.bucketize(blocks / divisor(nested).unsqueeze(-1), (levels[:-1] + levels[1:]) / 2)
        codes = codes.to(torch.uint8).flatten()[: absmax.numel()].view_as(absmax).contiguous()
        return {"absmax": codes, "nested_absmax": nested, "offset": offset.view(1)}

    def scale(self, params: Params) -> Float[Tensor, "out groups"]:
        codes = params["absmax"]
        levels = dynamic_levels().to(codes.device)
        scale = blocked(levels[codes.int()]) * params["nested_absmax"].unsqueeze(-1)
        return scale.flatten()[: codes.numel()].view(codes.shape) + params["offset"]


def blocked(values: Tensor) -> Float[Tensor, "blocks 256"]:
    """All values in the order they lie in, the last block filled up with zeros."""
    return torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def dynamic_levels() -> Float[Tensor, " 256"]:
    """The signed 8-bit dynamic data type (Dettmers 2016, https://arxiv.org/abs/1511.04561), ascending: zero, one, and
    for every decade up to 1 twice as many levels as for the one below, on both sides.

    The middles of equal parts of 0.1 to 1, times a power of ten, in float32 as bitsandbytes computes them.
    """
    first = torch.tensor(0.1)
    positive = [torch.ones(1)]
    for decade in range(7):
        num_parts = 2**decade
        part, i = ((1 - first) / num_parts).double(), torch.arange(num_parts + 1)
        edges = torch.where(2 * i < num_parts, first + part * i, 1 - part * (num_parts - i)).float()
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    levels = torch.cat(positive)
    return torch.cat([-levels[1:], torch.zeros(1), levels]).sort().values
