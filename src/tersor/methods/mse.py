"""Searched scales: clipping the largest weights of a group allows a smaller step for all others.

Choosing the clipping range by squared error goes back to Sung et al. 2015 (https://arxiv.org/abs/1511.06488) and
OMSE (Choukroun et al. 2019, https://arxiv.org/abs/1902.06822). Here every group tries a row of ranges and keeps the
best. Small floats also try wider ones, for their levels are uneven: the largest weight of an FP4 block may do better on
4 than on 6 (four over six). Lopsided levels are tried the other way round as well. Integer grids then fit their scale
once more by least squares to the codes they chose; K-quants do so for every range, with their minimum. Columns are
weighted by the loss's curvature where calibration measured it. No group ever does worse than `nearest`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.threads import total
from tersor.formats.codebook import Codebook
from tersor.formats.contract import Encoded, Format, Grid, Params, Weight
from tersor.formats.int_group import by_rows
from tersor.methods.contract import MethodFor
from tersor.methods.kmeans import Kmeans, column_importance, weighted_codebook
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Mse(MethodFor[Grid]):
    """Search each group's scale by weighted squared error.

    Attributes:
        num_steps: how many ranges are tried beside the full one.
        smallest: the smallest of them for integers, as a fraction of the full range.
    """

    num_steps: int = 20
    smallest: float = 0.4

    name = "mse"
    fills = Grid
    refusal = "searches the scales of a grid, and {format} has none; use nearest"
    needs = frozenset({"column_weight"})

    def __post_init__(self) -> None:
        if not (0 < self.smallest <= 1 and self.num_steps > 0):
            raise InputError(f"{self}: smallest must lie in (0, 1], and num_steps above 0")

    def accepts(self, format: Format) -> str | None:
        if format.usual_methods.without_inputs == Kmeans.name:
            return f"mse searches scales, and {format.name} has none; use kmeans"
        return super().accepts(format)

    def fill(self, weight: Weight, format: Grid, stats: Stats) -> Encoded:
        return format.encode(weight, self.search(weight, format, column_importance(weight, stats)))

    def search(self, weight: Weight, format: Grid, importance: Float[Tensor, " in"]) -> Params:
        """The parameters of least weighted squared error for every group; rows are searched a few at a time."""
        if any(len(param) != len(weight) for param in format.fit(weight).values()):
            return self.search_groups(weight, format, importance)  # rows share parameters
        return by_rows(weight, lambda rows: self.search_groups(rows, format, importance))

    def search_groups(self, weight: Weight, format: Grid, importance: Float[Tensor, " in"]) -> Params:
        """The search for all rows of `weight` at once."""

        def error(params: Params) -> Float[Tensor, "rows groups"]:
            return format.grouped((format.fake_quantize(weight, params) - weight).square_().mul_(importance)).sum(-1)

        plain = format.fit(weight)
        before = lowest = error(plain)
        if format.refits_every_range:
            # A minimum beside the scale: every range is a start for least squares in both.
            for shrink in self.ranges(format):
                tried = format.refit(weight, format.fit(weight, shrink), importance)
                found = error(tried)
                plain = format.chosen(found < lowest, tried, plain)
                lowest = torch.minimum(found, lowest)
            return format.refit(weight, format.refit(weight, plain, importance), importance)
        best_range = torch.ones_like(lowest)
        for shrink in self.ranges(format):
            found = error(format.fit(weight, shrink))
            best_range = torch.where(found < lowest, shrink, best_range)
            lowest = torch.minimum(found, lowest)
        best = format.fit(weight, best_range)
        # Groups whose scales are stored together may disturb one another.
        if total(error(best)) > total(before):
            return plain
        refitted = format.refit(weight, best, importance)
        return best if refitted is best else format.chosen(error(refitted) < lowest, refitted, best)

    def ranges(self, format: Grid) -> list[float]:
        """The ranges tried beside the full one, as fractions of it; negative ones turn the levels around."""
        if format.integer_bits is None:
            low, high = format.search_range
            ranges = [low + (high - low) * step / self.num_steps for step in range(self.num_steps + 1)]
            return ranges + [-shrink for shrink in ranges] if format.asymmetric_range else ranges
        ranges = [1 - (1 - self.smallest) * step / self.num_steps for step in range(1, self.num_steps + 1)]
        # From 4 bits on, one level more at one end is not worth the time.
        return (
            ranges + [-shrink for shrink in (1.0, *ranges)]
            if format.asymmetric_range and format.integer_bits < 4
            else ranges
        )


def searched(weight: Weight, format: Grid, importance: Float[Tensor, " in"]) -> Params:
    """Parameters (scales, zero points) of least squared error, where an error in column j counts `importance[j]`."""
    if isinstance(format, Codebook):
        return weighted_codebook(weight, format, importance.expand_as(weight))
    fine = format.integer_bits is not None and format.integer_bits >= 4  # then a coarser search does as well
    return Mse(num_steps=10 if fine else 20).search(weight, format, importance)
