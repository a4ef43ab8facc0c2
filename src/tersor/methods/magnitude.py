"""Magnitude pruning: the smallest weights go (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

from dataclasses import dataclass

import torch

from tersor.encoded import Encoded
from tersor.errors import InputError
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Format, Weight
from tersor.stats import Stats


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest `1 - sparsity` of each site's weights, by absolute value.

    Attributes:
        sparsity: the fraction of weights set to zero, exact to one weight; 0 <= sparsity < 1.

    >>> weight = torch.tensor([[0.1, -2.0, 3.0, 0.5]])
    >>> Magnitude(sparsity=0.5).compress(weight, Bitmask(), Stats()).decode()
    tensor([[ 0., -2.,  3.,  0.]])
    """

    sparsity: float = 0.5

    name = "magnitude"
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"magnitude: sparsity={self.sparsity} is not a fraction; give one in [0, 1), such as 0.5")

    def accepts(self, format: Format) -> str | None:
        if isinstance(format, Bitmask):
            return None
        return f"magnitude zeroes weights, and {format.name} stores zeros like any weight; use bitmask"

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        num_zeros = int(self.sparsity * weight.numel())
        order = weight.abs().flatten().argsort(stable=True)
        mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[order[:num_zeros]] = False
        return format.encode(weight, {"mask": mask.view_as(weight)})
