"""Searched scales: clip a little to round a lot finer.

Choosing the clipping range by squared error goes back to Sung et al. 2015 (https://arxiv.org/abs/1511.06488) and
OMSE (Choukroun et al. 2019, https://arxiv.org/abs/1902.06822). Here every group tries a grid of shrunken ranges, then
fits its scale once more by least squares to the codes it chose, and keeps whatever was best; so no group ever does
worse than `nearest`. Columns are weighted by the loss's curvature where calibration measured it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.encoded import Encoded
from tersor.errors import InputError
from tersor.formats.contract import Format, Params, Weight
from tersor.formats.int_group import IntGroup, by_rows
from tersor.stats import Stats


@dataclass(frozen=True)
class Mse:
    """Search each group's scale by weighted squared error.

    Attributes:
        num_steps: how many shrunken ranges are tried.
        smallest: the smallest of them, as a fraction of the full range.
    """

    num_steps: int = 20
    smallest: float = 0.4

    name = "mse"
    needs = frozenset({"column_weight"})

    def __post_init__(self) -> None:
        if not (0 < self.smallest <= 1 and self.num_steps > 0):
            raise InputError(f"{self}: smallest must lie in (0, 1], and num_steps above 0")

    def accepts(self, format: Format) -> str | None:
        if isinstance(format, IntGroup):
            return None
        return f"mse searches the scales of an integer format, and {format.name} has none; use nearest"

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        assert isinstance(format, IntGroup)
        importance = column_importance(weight, stats)
        return format.encode(weight, by_rows(weight, lambda rows: self.search(rows, format, importance)))

    def search(self, weight: Weight, format: IntGroup, importance: Float[Tensor, " in"]) -> Params:
        """The best parameters found for every group."""

        def error(params: Params) -> Float[Tensor, "out groups"]:
            return format.grouped((format.snap(weight, params) - weight).square_().mul_(importance)).sum(-1)

        best = format.fit(weight)
        lowest = error(best)
        for step in range(1, self.num_steps + 1):
            shrink = 1 - (1 - self.smallest) * step / self.num_steps
            candidate = format.fit(weight, shrink)
            lowest = keep_better(best, lowest, candidate, error(candidate))
        candidate = {**best, "scale": least_squares_scale(weight, format, best, importance)}
        keep_better(best, lowest, candidate, error(candidate))
        return best


def column_importance(weight: Weight, stats: Stats) -> Float[Tensor, " in"]:
    """The columns' curvature with a floor of 1 % of its mean, or ones without data."""
    if stats.column_weight is None:
        return torch.ones(weight.shape[1], device=weight.device)
    return stats.column_weight.to(weight.device) + 0.01


def keep_better(best: Params, lowest: Tensor, candidate: Params, error: Tensor) -> Float[Tensor, "out groups"]:
    """Take over the candidate's parameters (in place) in the groups where its error is lower."""
    better = error < lowest
    for name in best:
        best[name] = torch.where(better, candidate[name], best[name])
    return torch.where(better, error, lowest)


def least_squares_scale(
    weight: Weight, format: IntGroup, params: Params, importance: Float[Tensor, " in"]
) -> Float[Tensor, "out groups"]:
    """The scale that fits the weights best to the codes they have now: `<w, q> / <q, q>` per group."""
    q_ogk = format.grouped(format.quantize(weight, params)) - format.zero_point(params)
    hq_ogk = q_ogk * format.grouped(importance.expand_as(weight))
    energy = (hq_ogk * q_ogk).sum(-1)
    scale = (hq_ogk * format.grouped(weight)).sum(-1) / torch.where(energy == 0, 1.0, energy)
    return torch.where(energy == 0, params["scale"].float(), scale).half()
