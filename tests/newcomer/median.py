"""A range of three medians: what lies further out is clipped. A robust scale (Huber 1981,
https://doi.org/10.1002/0471725250), for the tests."""

from dataclasses import dataclass

import torch

from tersor.formats.contract import Encoded, Grid, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Median(MethodFor[Grid]):
    """Clip each group at some medians of its magnitudes.

    Attributes:
        times: how many medians the range is wide.
    """

    times: float = 3.0

    name = "median"
    needs = frozenset[str]()
    fills = Grid
    refusal = "clips the range of a grid, and {format} has none; use int4-g64"

    def fill(self, weight: Weight, format: Grid, stats: Stats) -> Encoded:
        magnitude = format.grouped(weight).abs()
        median, largest = magnitude.median(-1).values, magnitude.amax(-1)
        part = torch.where(median > 0, self.times * median / largest, 1.0).clamp(max=1.0)
        return format.encode(weight, format.fit(weight, part))
