"""Weights of three values, as in ternary weight networks (Li and Liu 2016, https://arxiv.org/abs/1605.04711).

weight = (code - 2) * scale, with the codes 1, 2 and 3 in two bits and a scale per row
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.formats.contract import Encoded, Grid, Layout, Packing, Params, Projector, UsualMethods, Weight
from tersor.formats.float_cast import to_half
from tersor.formats.four_bit import divisor
from tersor.formats.packing import pack, packed_width, unpack
from tersor.formats.trainable import LearnableRange, Trainable, half
from tersor.formats.views import IntegerView


@dataclass(frozen=True)
class Ternary(Grid):
    """Minus one, zero or one, times the scale of the row."""

    name = "ternary"
    rows_independent = True
    usual_methods = UsualMethods("nearest", "mse", "gptq")
    asymmetric_range = False
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {"scale": Trainable(half)}
    learnable_range = LearnableRange(lowest=1.0, highest=3.0, num_steps=2.0, largest=1.0, zero_point=2.0)

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {
            "codes": (torch.uint8, (shape[0], packed_width(shape[1], 2))),
            "scale": (torch.float16, (shape[0], 1)),
        }

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {"codes": (2, shape[1])}

    def as_integers(self, encoded: Encoded) -> IntegerView:
        return IntegerView(2, None, encoded.shape, encoded.parts["codes"], encoded.parts["scale"])

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        scale = weight.abs().amax(1, keepdim=True) * shrink
        return {"scale": to_half(scale, f"{self.name}: a scale of")}

    def signs(self, weight: Weight, params: Params) -> Float[Tensor, "out in"]:
        """Minus one, zero or one for each weight."""
        return (weight / divisor(params["scale"].float())).round().clamp(-1, 1) + 0.0

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return self.signs(weight, params) * params["scale"].float() + 0.0

    def encode(self, weight: Weight, params: Params) -> Encoded:
        codes = pack((self.signs(weight, params) + 2).to(torch.uint8), 2)
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"codes": codes, **params})

    def decode(self, encoded: Encoded) -> Weight:
        signs = unpack(encoded.parts["codes"], 2, encoded.shape[1]).float() - 2
        return signs * encoded.parts["scale"].float() + 0.0

    def grouped(self, weight: Weight) -> Float[Tensor, "rows groups k"]:
        return weight.unsqueeze(1)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        return lambda values, j: self.fake_quantize(values.unsqueeze(1), params).squeeze(1)
