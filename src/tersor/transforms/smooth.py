"""SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438): move outliers from activations to weights.

A few input features of a linear layer are far larger than the rest and leave them little of an 8-bit grid. Dividing
feature j by `s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)` and multiplying column j of the weight with it changes
nothing but what rounding costs. The division is folded into what feeds the layer: a norm's gain, or the rows of the
linear layer before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.activations.quantizers import IntStatic
from tersor.core.errors import InputError
from tersor.formats.int_group import IntGroup
from tersor.methods.stats import Stats
from tersor.nn.connections.connection import Connection
from tersor.nn.parameters import matrix
from tersor.transforms.scaling import require_connections, scale, stats_of

ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_TOKENS = 256  # of the sample that the search runs on


@dataclass(frozen=True)
class Smooth:
    """Balance the ranges of activations and weights, for int8 activations.

    Attributes:
        alpha: 0 <= alpha <= 1: how much of the activations' range moves to the weights. Without it, every group of
            layers that share an input takes the one (or none) with the least error in int8.
    """

    alpha: float | None = None

    name = "smooth"
    needs = frozenset({"largest", "sample"})

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"smooth: alpha={self.alpha} is not in [0, 1]; give for example 0.5, or none to search it")

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        for connection in require_connections(model, self.name):
            readers = [matrix(model.get_submodule(path)).float() for path in connection.readers]
            factor = self.factor(connection, readers, stats_of(connection, stats))
            if factor is not None:
                scale(connection, model, factor)

    def factor(
        self, connection: Connection, weights: Sequence[Tensor], stats: Stats
    ) -> Float[Tensor, " features"] | None:
        """The factor that the source is divided by; None if nothing is known of the inputs."""
        if stats.largest is None:
            return None
        inputs = connection.largest(stats.largest.float())
        columns = connection.largest(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))
        if self.alpha is not None or stats.sample is None:
            return smoothing(inputs, columns, 0.5 if self.alpha is None else self.alpha)
        seen = replace(stats, sample=stats.sample[:NUM_TOKENS].float())
        weight = torch.cat(list(weights))
        candidates = [torch.ones_like(inputs), *(smoothing(inputs, columns, alpha) for alpha in ALPHAS)]
        return min(candidates, key=lambda factor: int8_error(seen, weight, connection.spread(factor, weight.shape[1])))


def smoothing(inputs: Tensor, columns: Tensor, alpha: float) -> Float[Tensor, " features"]:
    """`inputs^alpha / columns^(1 - alpha)`, and one where a feature or its column is dead."""
    dead = (inputs == 0) | (columns == 0)
    factor = inputs.pow(alpha) / columns.pow(1 - alpha)
    return torch.where(dead, 1.0, factor / factor[~dead].log().mean().exp()).clamp(1e-4, 1e4)


def int8_error(stats: Stats, weight: Float[Tensor, "out in"], factor: Float[Tensor, " in"]) -> float:
    """The error of the outputs on the sample when the scaled inputs and weights are both rounded to int8: its square as
    a share of the token's outputs, for the norms behind it make tokens equally large."""
    assert stats.sample is not None
    x, largest = stats.sample / factor, None if stats.largest is None else stats.largest / factor
    activation, format = IntStatic(8), IntGroup(8)
    x_int8 = activation.fake_quantize(x, activation.fit(Stats(sample=x, largest=largest)))
    w_int8 = format.fake_quantize(weight * factor, format.fit(weight * factor))
    exact = stats.sample @ weight.t()
    errors = (x_int8 @ w_int8.t() - exact).square().sum(1)
    return (errors / exact.square().sum(1).clamp_min(1e-12)).sum().item()
