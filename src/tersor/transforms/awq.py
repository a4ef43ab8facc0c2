"""AWQ: activation-aware scales (Lin et al. 2023, https://arxiv.org/abs/2306.00978).

A column of a weight matters as much as the inputs it meets. Multiplying the columns that meet large inputs makes their
rounding error smaller against the group's scale; what feeds the layer is divided by the same factors. They are
`mean|x_j|^ratio`, with the ratio of least output error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.threads import total
from tersor.formats import format_named
from tersor.formats.contract import Format
from tersor.methods.stats import Stats
from tersor.nn.connections.connection import Connection
from tersor.nn.parameters import matrix
from tersor.transforms.scaling import require_connections, scale, stats_of


@dataclass(frozen=True)
class Awq:
    """Scale up the columns that meet large inputs.

    Attributes:
        format: what the weights will be stored in; without it the format of the recipe's weights, else int4-g64.
        num_steps: how many ratios in (0, 1] are tried.
    """

    format: str | None = None
    num_steps: int = 20

    name = "awq"
    needs = frozenset({"sample"})

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"awq: num_steps={self.num_steps} is not above 0; give for example 20")
        format_named(self.format or "int4-g64")

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        format = format_named(self.format or "int4-g64")
        for connection in require_connections(model, self.name):
            sample = stats_of(connection, stats).sample
            if sample is not None:
                readers = [matrix(model.get_submodule(path)).float() for path in connection.readers]
                factor = self.factor(connection, readers, sample.float(), format)
                if factor is not None:
                    scale(connection, model, factor)

    def factor(
        self, connection: Connection, weights: Sequence[Tensor], x: Float[Tensor, "token in"], format: Format
    ) -> Float[Tensor, " features"] | None:
        """The factor that the source is divided by; None if no ratio lowers the error."""
        size = connection.largest(x.abs().mean(0)).clamp_min(1e-8)
        candidates: list[Tensor | None] = [None]
        for step in range(1, self.num_steps + 1):
            factor = size ** (step / self.num_steps)
            candidates.append(factor / (factor.amax() * factor.amin()).sqrt())

        def error(factor: Tensor | None) -> float:
            return sum(output_error(x, w, format, factor, connection) for w in weights)

        return min(candidates, key=error)


def output_error(
    x: Float[Tensor, "token in"],
    weight: Float[Tensor, "out in"],
    format: Format,
    factor: Tensor | None,
    connection: Connection,
) -> float:
    """The squared error of a reader's outputs on the sample, when its scaled weight is rounded to the format."""
    columns = torch.ones(weight.shape[1]) if factor is None else connection.spread(factor, weight.shape[1])
    scaled = weight * columns
    error = format.fake_quantize(scaled, format.fit(scaled)) / columns - weight
    return total((x @ error.t()).square()).item()
