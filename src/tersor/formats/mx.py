"""FP4 with block scales: MXFP4 (OCP Microscaling Formats 1.0, 2023; Rouhani et al. 2023,
https://arxiv.org/abs/2310.10537) and NVFP4 (NVIDIA 2025, https://arxiv.org/abs/2509.25149).

A weight is a float of one sign, two exponent and one mantissa bit (E2M1), times the scale of its block. MXFP4 has 32
weights per block and powers of two as scales; NVFP4 has 16 weights, E4M3 scales, and one more scale for the tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.formats.contract import Layout, Params, Weight
from tersor.formats.four_bit import FourBit, Levels
from tersor.formats.trainable import Trainable, e4m3

E2M1 = Levels.of([sign * x for sign in (1, -1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], ties_to_even=True)
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


@dataclass(frozen=True)
class Mxfp4(FourBit):
    """Blocks of 32 with a power of two each.

    Parts:
        codes: E2M1, sign in the highest bit, the first of a byte in the low half; no -0 is written.
        scale: `[out, ceil(in / 32)]` uint8 (E8M0): the scale is `2**(scale - 127)`. 1 to 252 are written, so that
            neither a scale is subnormal nor a weight infinite.

    >>> weight = torch.tensor([[0.9, -3.0, 5.1, 0.2]])
    >>> Mxfp4().fake_quantize(weight, Mxfp4().fit(weight))
    tensor([[ 1., -3.,  6.,  0.]])
    """

    name = "mxfp4"
    element = "e2m1"
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {}  # powers of two leave nothing to train
    group_size = 32
    levels = E2M1

    def scale_layout(self, groups: tuple[int, int]) -> Layout:
        return {"scale": (torch.uint8, groups)}

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """The standard's rule: the exponent of the largest weight of a block becomes the largest of E2M1, which is 2.
        What is then above 6 steps is cut off; `shrink` above one can lift the scale to spare it."""
        # Of the float 2**(exponent - 1) * mantissa with 1/2 <= mantissa < 1; a zero gets the smallest scale.
        largest = self.grouped(weight).abs().amax(-1) * shrink
        exponent = torch.where(largest == 0, -127, torch.frexp(largest).exponent - 1)
        return {"scale": (exponent - 2 + 127).clamp(1, 252).to(torch.uint8)}

    def scale(self, params: Params) -> Float[Tensor, "out groups"]:
        return power_of_two(params["scale"])


@dataclass(frozen=True)
class Nvfp4(FourBit):
    """Blocks of 16 with an E4M3 scale each, and a scale of the whole tensor.

    The tensor's scale is a power of two. That costs nothing, as block scales are floats, and a reader gets the same
    weights to the last bit in whatever order it multiplies, also one that stores the reciprocal and divides.

    Parts:
        codes: as of `mxfp4`.
        scale: `[out, ceil(in / 16)]` E4M3, not negative.
        tensor_scale: `[1]` float32; a weight is `level * scale * tensor_scale`.

    >>> weight = torch.tensor([[0.9, -3.0, 5.1, 0.2]])
    >>> Nvfp4().fake_quantize(weight, Nvfp4().fit(weight)).mul(10).round()
    tensor([[  9., -26.,  52.,   0.]])
    """

    name = "nvfp4"
    element = "e2m1"
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {"scale": Trainable(e4m3)}
    group_size = 16
    levels = E2M1

    def scale_layout(self, groups: tuple[int, int]) -> Layout:
        return {"scale": (torch.float8_e4m3fn, groups), "tensor_scale": (torch.float32, (1,))}

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """The largest weight of a block becomes 6. The tensor's scale leaves room to make block scales larger by half,
        so that the largest weight may become 4, around which the levels are finer (four over six)."""
        largest = self.grouped(weight).abs().amax(-1)
        peak = largest.max() * (1.5 / 6 / E4M3_MAX)
        # The next power of two, at least 2**-126 / 2**-9 so that no product of scales is subnormal.
        tensor_scale = power_of_two(127 + torch.frexp(peak).exponent.clamp(min=-117))
        scale = (largest * shrink / 6 / tensor_scale).clamp(max=E4M3_MAX)
        return {"scale": scale.to(torch.float8_e4m3fn), "tensor_scale": tensor_scale.view(1)}

    def scale(self, params: Params) -> Float[Tensor, "out groups"]:
        return params["scale"].float() * params["tensor_scale"].view(-1, 1)


def power_of_two(code: Tensor) -> Tensor:
    """`2**(code - 127)` for codes 1 to 254: the exponent bits of a float32."""
    return (code.int() << 23).view(torch.float32)
