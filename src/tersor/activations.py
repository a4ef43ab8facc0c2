"""How a site's input is quantized when the site runs.

A weight's format says what is stored; an activation format says what the arithmetic sees. The table below is the place
for static int8, FP8 and learned ranges: one class each, with `fit` choosing its parameters from calibration and `snap`
giving the reference result that every kernel is judged against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from tersor.errors import UnknownName
from tersor.stats import Stats


@dataclass(frozen=True, eq=False)
class Activation:
    """An input quantizer at one site: the format's name and its parameters.

    `params` holds static scales and zero points; it is empty when they are computed from each input.
    """

    format: str
    params: dict[str, Tensor] = field(default_factory=dict)

    def snap(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return ACTIVATIONS[self.format].snap(x, self.params)


@runtime_checkable
class ActivationFormat(Protocol):
    """A way to quantize inputs."""

    name: str
    needs: frozenset[str]

    def fit(self, stats: Stats) -> dict[str, Tensor]:
        """Static parameters from calibration; empty for dynamic formats."""

    def snap(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        """The values the arithmetic stands for: quantized, then dequantized."""


@dataclass(frozen=True)
class Int8Dynamic:
    """Symmetric int8 with one scale per token, taken from the token itself when the site runs.

    A token's result does not depend on what else is in the batch
    (Dettmers et al. 2022, vector-wise quantization, https://arxiv.org/abs/2208.07339).
    """

    name = "int8-dynamic"
    needs = frozenset[str]()

    def fit(self, stats: Stats) -> dict[str, Tensor]:
        return {}

    def quantize(self, x: Float[Tensor, "*batch in"]) -> tuple[Int8[Tensor, "*batch in"], Float[Tensor, "*batch 1"]]:
        """Codes in -127..127 and the scale of each token, float32."""
        x = x.float()
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12).div_(127)
        return (x / scale).round_().to(torch.int8), scale

    def snap(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        codes, scale = self.quantize(x)
        return (codes * scale).to(x.dtype)


ACTIVATIONS: dict[str, ActivationFormat] = {activation.name: activation for activation in [Int8Dynamic()]}


def activation_named(name: str) -> ActivationFormat:
    """The activation format a recipe or an artifact names."""
    if name not in ACTIVATIONS:
        raise UnknownName("activation format", name, ACTIVATIONS)
    return ACTIVATIONS[name]
