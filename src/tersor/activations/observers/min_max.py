"""The whole range that calibration saw (Jacob et al. 2017, https://arxiv.org/abs/1712.05877).

Nothing seen is clipped; one far outlier makes the steps large for all others.
"""

from dataclasses import dataclass

from tersor.activations.observers.contract import CodeRange, ranges_of
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class MinMax:
    """The whole range: from the smallest to the largest input of the calibration data."""

    name = "min-max"
    needs = frozenset({"ranges"})

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        ranges = ranges_of(codes, stats)
        return min(ranges[:, 0].min().item(), 0.0), max(ranges[:, 1].max().item(), 0.0)
