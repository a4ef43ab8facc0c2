"""Wanda: prune by weight and activation (Sun et al. 2023, https://arxiv.org/abs/2306.11695).

A weight counts as much as what it adds to the output: `|W_ij| * ||x_j||`. Weights are compared within a row, so every
output loses the same share of its inputs; what stays is not changed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.threads import mean
from tersor.formats.contract import Encoded, Sparse, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.magnitude import check_sparsity, keep_highest
from tersor.methods.stats import Stats

SILENT = 1e-6  # of the inputs' mean energy


@dataclass(frozen=True)
class Wanda(MethodFor[Sparse]):
    """Keep the `1 - sparsity` of each row's weights that count most.

    Attributes:
        sparsity: the fraction of weights set to zero in every row, to one weight; 0 <= sparsity < 1. Patterns such as
            `2:4` say it themselves.

    >>> from tersor.formats.bitmask import Bitmask
    >>> stats = Stats(second_moment=torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0])))
    >>> Wanda(sparsity=0.5).compress(torch.tensor([[0.5, -2.0, 3.0, 1.0]]), Bitmask(), stats).decode()
    tensor([[0.5000, 0.0000, 3.0000, 0.0000]])
    """

    sparsity: float = 0.5

    name = "wanda"
    fills = Sparse
    refusal = "zeroes weights, and {format} stores zeros like any weight; use bitmask"
    needs = frozenset({"second_moment", "column_weight"})

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)

    def fill(self, weight: Weight, format: Sparse, stats: Stats) -> Encoded:
        score = weight.abs() * input_energy(weight, stats).sqrt()
        # A score's rank within its row makes rows comparable: all lose the same share, to one weight.
        rank = score.argsort(dim=1, stable=True).argsort(dim=1)
        return keep_highest(weight, rank.float(), self.sparsity, format, stats)


def input_energy(weight: Weight, stats: Stats) -> Float[Tensor, " in"]:
    """`E[x_j^2]` of every input; without it the curvature stands in, and one without data, or where all inputs were
    silent. Among silent inputs, and nearly silent ones, the weights' own size decides."""
    energy = stats.column_weight if stats.second_moment is None else stats.second_moment.diagonal()
    if energy is None or not energy.any():
        return torch.ones(weight.shape[1], device=weight.device)
    return energy.clamp_min(SILENT * mean(energy)).to(weight)
