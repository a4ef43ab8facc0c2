"""Percentiles of the inputs (McKinstry et al. 2018, https://arxiv.org/abs/1809.04191; compared with others in Wu et al.
2020, https://arxiv.org/abs/2004.09602)."""

from dataclasses import dataclass

import torch

from tersor.activations.observers.contract import CodeRange, histogram_of
from tersor.core.errors import InputError
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Percentile:
    """The range outside of which `100 - percentile` percent of the inputs lie, half of them on either side.

    Attributes:
        percentile: above 50, up to 100, which is `min-max`.
    """

    percentile: float = 99.99

    name = "percentile"
    needs = frozenset({"histogram"})

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile: percentile={self.percentile} is not in 50 < percentile <= 100; try 99.99")

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        values, counts = histogram_of(codes, stats)
        below = counts.cumsum(0)
        outside = (1 - self.percentile / 100) / 2 * below[-1]
        low = int(torch.searchsorted(below, outside, right=True))
        high = int(torch.searchsorted(below, below[-1] - outside))
        last = len(values) - 1
        return min(values[min(low, last)].item(), 0.0), max(values[min(high, last)].item(), 0.0)
