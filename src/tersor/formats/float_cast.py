"""16-bit floats: IEEE half (`fp16`) and bfloat16 (`bf16`, Kalamkar et al. 2019, https://arxiv.org/abs/1905.12322)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.contract import Encoded, Format, Layout, Packing, Params, UsualMethods, Weight
from tersor.formats.trainable import Trainable
from tersor.formats.views import FloatView

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FloatCast(Format):
    """Every weight rounded to the nearest 16-bit float.

    >>> FloatCast("bf16").fake_quantize(torch.tensor([[1.001]]), {})
    tensor([[1.]])
    """

    kind: str
    rows_independent = True
    usual_methods = UsualMethods("nearest", "nearest", "nearest")
    rounds_each_weight = True
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {}
    learnable_range = None

    @property
    def name(self) -> str:
        return self.kind

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {"values": (self.dtype, shape)}

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> FloatView:
        return FloatView(self.kind, None, encoded.shape, encoded.parts["values"])

    def fit(self, weight: Weight) -> Params:
        largest = weight.abs().max().item()
        if largest > torch.finfo(self.dtype).max:
            raise FormatError(
                f"{self.name}: the largest weight {largest:.3g} overflows to infinity; keep this weight as it is"
            )
        return {}

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return weight.to(self.dtype).float()

    def encode(self, weight: Weight, params: Params) -> Encoded:
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"values": weight.to(self.dtype)})

    def decode(self, encoded: Encoded) -> Weight:
        return encoded.parts["values"].float()


LARGEST_HALF = torch.finfo(torch.float16).max
LEAST_KEPT = 15 / 16  # of the length of some values: what fp16 must hold


def to_half(values: Tensor, what: str) -> Tensor:
    """The values in fp16. Raises FormatError if one overflows or most are too small; `what` names the largest.

    >>> to_half(torch.tensor([7e4]), "bitmask: the largest weight")
    Traceback (most recent call last):
    tersor.core.errors.FormatError: bitmask: the largest weight 7e+04 overflows fp16; keep this weight in bf16
    """
    half = values.half()
    if not half.isfinite().all():
        raise FormatError(f"{what} {values.abs().max().item():.3g} overflows fp16; keep this weight in bf16")
    error, length = (half.double() - values).norm(), values.double().norm()
    if error > (1 - LEAST_KEPT) * length:
        raise FormatError(f"{what} {values.abs().max().item():.3g} is too small for fp16; keep this weight in bf16")
    return half
