"""The moving average of the ranges of runs of inputs (Jacob et al. 2017, section 3.1, https://arxiv.org/abs/1712.05877).

What is far away in one run alone counts little, and the latest runs count most.
"""

from dataclasses import dataclass

from tersor.activations.observers.contract import CodeRange, ranges_of
from tersor.core.errors import InputError
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class MovingAverage:
    """`average = momentum * average + (1 - momentum) * range` over the runs of `Stats.ranges`, from the first one on.

    Attributes:
        momentum: at least 0 and below 1; 0 leaves the last run alone.
    """

    momentum: float = 0.9

    name = "moving-average"
    needs = frozenset({"ranges"})

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"moving-average: momentum={self.momentum} is not in 0 <= momentum < 1; try 0.9")

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        ranges = ranges_of(codes, stats).double()
        average = ranges[0]
        for run in ranges[1:]:
            average = self.momentum * average + (1 - self.momentum) * run
        return min(average[0].item(), 0.0), max(average[1].item(), 0.0)
