"""Magnitude pruning: the smallest weights are set to zero (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import InputError
from tersor.formats.contract import Encoded, Sparse, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.kmeans import column_importance
from tersor.methods.mse import Mse
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Magnitude(MethodFor[Sparse]):
    """Keep the largest `1 - sparsity` of each site's weights, by absolute value.

    Attributes:
        sparsity: the fraction of weights set to zero, exact to one weight; 0 <= sparsity < 1. Patterns such as `2:4`
            say it themselves.

    >>> from tersor.formats.bitmask import Bitmask
    >>> weight = torch.tensor([[0.1, -2.0, 3.0, 0.5]])
    >>> Magnitude(sparsity=0.5).compress(weight, Bitmask(), Stats()).decode()
    tensor([[ 0., -2.,  3.,  0.]])
    """

    sparsity: float = 0.5

    name = "magnitude"
    fills = Sparse
    refusal = "zeroes weights, and {format} stores zeros like any weight; use bitmask"
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)

    def fill(self, weight: Weight, format: Sparse, stats: Stats) -> Encoded:
        return keep_highest(weight, weight.abs(), self.sparsity, format, Stats())


# What every method shares that chooses a mask by a score.


def check_sparsity(method: str, sparsity: float) -> None:
    """Raises InputError unless `sparsity` is a fraction in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise InputError(f"{method}: sparsity={sparsity} is not a fraction; give one in [0, 1), such as 0.5")


def keep_highest(
    weight: Weight, score: Float[Tensor, "out in"], sparsity: float, format: Sparse, stats: Stats
) -> Encoded:
    """The weights of the highest scores in the format's mask; `1 - sparsity` of them are kept."""
    return encode_masked(weight, format.choose(score, sparsity), format, stats)


def encode_masked(weight: Weight, mask: Bool[Tensor, "out in"], format: Sparse, stats: Stats) -> Encoded:
    """The weights of a mask as they are, or where the format holds integers, with scales searched for them alone."""
    if format.kept_grid is None:
        return format.encode(weight, {"mask": mask})
    kept = torch.where(mask, weight, 0.0)
    return format.encode(kept, {"mask": mask, **Mse().search(kept, format.kept_grid, column_importance(weight, stats))})
