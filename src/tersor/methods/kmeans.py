"""Weighted k-means: a codebook whose values are the weighted means of the weights they stand for.

Deep Compression (Han et al. 2016, https://arxiv.org/abs/1510.00149); weighted by sensitivity in SqueezeLLM (Kim et al.
2023, https://arxiv.org/abs/2306.07629). A weight counts as much as the loss's curvature there: that of its row times
that of its column. Without data all weights count the same, and the codebook is the format's plain one.

Of pruned weights, what is zero stays zero: one of the values is 0, and the others are the means of what is left.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.threads import mean
from tersor.formats.codebook import Codebook, clustered
from tersor.formats.contract import Encoded, Params, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Kmeans(MethodFor[Codebook]):
    """The codebook by weighted k-means, then the nearest value for every weight."""

    name = "kmeans"
    fills = Codebook
    refusal = "fills a codebook, and {format} has none; use codebook16"
    needs = frozenset({"row_weight", "column_weight"})

    def fill(self, weight: Weight, format: Codebook, stats: Stats) -> Encoded:
        importance = row_importance(weight, stats).unsqueeze(1) * column_importance(weight, stats)
        return format.encode(weight, weighted_codebook(weight, format, importance))


def weighted_codebook(weight: Weight, format: Codebook, importance: Float[Tensor, "out in"]) -> Params:
    """For every row, or for the tensor: the better one of the weighted and the plain codebook; where zeros are more
    than one of its values serves on average, one with zero among them."""
    zeros = format.grouped(weight == 0).float().mean(-1)
    pruned = zeros > 1 / format.num_values
    if not pruned.any():
        return dense_codebook(weight, format, importance)
    sparse = sparse_codebook(weight, format, importance)
    if pruned.all():
        return sparse
    dense = dense_codebook(weight, format, importance)
    return {"codebook": torch.where(pruned, sparse["codebook"], dense["codebook"])}


def sparse_codebook(weight: Weight, format: Codebook, importance: Float[Tensor, "out in"]) -> Params:
    """The weighted means of the weights that are not zero, and zero."""
    w_rn, importance_rn = format.grouped(weight).squeeze(1), format.grouped(importance).squeeze(1)
    others = clustered(w_rn, importance_rn * (w_rn != 0), format.num_values - 1)
    return format.params(torch.nn.functional.pad(others, (1, 0)).sort(dim=-1).values)


def dense_codebook(weight: Weight, format: Codebook, importance: Float[Tensor, "out in"]) -> Params:
    """The codebook with the smaller weighted error: of k-means with weights, and of k-means without."""
    plain = format.fit(weight)
    if (importance == importance[0, 0]).all():
        return plain
    w_rn, importance_rn = format.grouped(weight).squeeze(1), format.grouped(importance).squeeze(1)
    weighted = format.params(clustered(w_rn, importance_rn, format.num_values))

    def error(params: Params) -> Float[Tensor, "rows 1"]:
        return format.grouped((format.fake_quantize(weight, params) - weight).square_().mul_(importance)).sum(-1)

    return {"codebook": torch.where(error(weighted) < error(plain), weighted["codebook"], plain["codebook"])}


def column_importance(weight: Weight, stats: Stats) -> Float[Tensor, " in"]:
    """The weight of an error in each column, with a floor of 1 % of the mean: the inputs' energy where it was
    measured, else the columns' curvature; ones without data."""
    energy = stats.column_weight if stats.second_moment is None else stats.second_moment.diagonal()
    return floored(energy, weight.shape[1], weight.device)


def row_importance(weight: Weight, stats: Stats) -> Float[Tensor, " out"]:
    """The weight of an error in each row, with the same floor; ones without data."""
    return floored(stats.row_weight, weight.shape[0], weight.device)


def floored(energy: Tensor | None, size: int, device: torch.device) -> Float[Tensor, " n"]:
    """The energies scaled to a mean of one, plus 1 % of that; ones if there is nothing to go by."""
    if energy is None or not energy.any():
        return torch.ones(size, device=device)
    return (energy / mean(energy)).float().to(device) + 0.01
