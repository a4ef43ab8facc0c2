"""8-bit floats (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433): `fp8-e4m3`, up to 448 with 3 bits of
mantissa, and `fp8-e5m2`, up to 57344 with 2. One scale per output row, or one for the whole tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.formats.contract import Encoded, Grid, Layout, Packing, Params, Projector, UsualMethods, Weight
from tersor.formats.four_bit import divisor
from tersor.formats.trainable import LearnableRange, Trainable, bfloat
from tersor.formats.views import FloatView

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8(Grid):
    """Weights `value * scale`, the largest weight on the largest value.

    The scale is a bfloat16, as compressed-tensors checkpoints of bfloat16 models have it: readers that keep scales in
    float32 or in the model's own type all get the same one.

    Parts:
        values: `[out, in]` E4M3 or E5M2, finite.
        scale: `[out, 1]` bf16, or `[1, 1]` for the whole tensor.

    >>> weight = torch.tensor([[0.9, -3.0, 5.1, 0.2]])
    >>> Fp8("e4m3").encode(weight, Fp8("e4m3").fit(weight)).parts["values"]
    tensor([[  80., -256.,  448.,   18.]], dtype=torch.float8_e4m3fn)
    """

    kind: str
    per_tensor: bool = False
    rows_independent = True
    usual_methods = UsualMethods("nearest", "mse", "gptq")
    asymmetric_range = False
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {"scale": Trainable(bfloat)}

    @property
    def name(self) -> str:
        return f"fp8-{self.kind}{'-tensor' if self.per_tensor else ''}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def learnable_range(self) -> LearnableRange:
        return LearnableRange(-self.largest, self.largest, 2 * self.largest, self.largest)

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {"values": (self.dtype, shape), "scale": (torch.bfloat16, (1 if self.per_tensor else shape[0], 1))}

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> FloatView:
        return FloatView(self.kind, None, encoded.shape, encoded.parts["values"], encoded.parts["scale"])

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """No scale is so large that a weight becomes infinite."""
        scale = self.grouped(weight).abs().amax(-1) * shrink / self.largest
        highest = torch.finfo(torch.float32).max / self.largest * (1 - 2**-8)  # stays below when rounded
        return {"scale": scale.clamp(max=highest).bfloat16()}

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        scale = params["scale"].float()
        return self.nearest(weight / divisor(scale)).float().mul_(scale)

    def encode(self, weight: Weight, params: Params) -> Encoded:
        values = self.nearest(weight / divisor(params["scale"].float()))
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"values": values, **params})

    def decode(self, encoded: Encoded) -> Weight:
        return encoded.parts["values"].float().mul_(encoded.parts["scale"].float())

    def nearest(self, steps: Tensor) -> Tensor:
        return steps.clamp(-self.largest, self.largest).to(self.dtype)

    def grouped(self, weight: Weight) -> Float[Tensor, "rows groups k"]:
        """The weights of each group: a group is a row, or the whole matrix."""
        return weight.reshape(1, 1, -1) if self.per_tensor else weight.unsqueeze(1)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        scale = params["scale"].float().squeeze(-1)
        steps = divisor(scale)

        def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
            return self.nearest(values / steps).float().mul_(scale)

        return project
