"""Weighted k-means: no worse than plain k-means, agreement with a slow version, and what the data changes."""

import numpy as np
import pytest
import torch

import laws
from laws import random, stats_for
from tersor.formats import FORMATS
from tersor.formats.codebook import Codebook
from tersor.methods import Kmeans, Nearest
from tersor.methods.stats import Stats

BOOKS = [name for name, format in FORMATS.items() if isinstance(format, Codebook)]


@pytest.mark.parametrize("name", BOOKS)
def test_never_worse_than_the_plain_codebook(name):
    format = FORMATS[name]
    for weight in laws.weights_for(format).values():
        if weight.any() and (weight == 0).float().mean() > 1 / format.num_values:
            continue  # that is pruned, see below
        for stats in stats_for(weight).values():
            importance = laws.importance(weight, stats)
            if format.per_tensor and stats.row_weight is not None:
                continue  # rows count differently there, see below
            laws.no_worse_than(Kmeans(), Nearest(), format, weight, stats, importance)


def test_rows_that_matter_more_get_the_values_of_a_shared_codebook():
    weight = torch.cat([random(4, 128), 3 + random(4, 128, seed=1)])
    rows = torch.tensor([1.0] * 4 + [0.0] * 4)
    stats = Stats(row_weight=rows, column_weight=torch.ones(128))
    blind, seeing = (
        (Kmeans().compress(weight, Codebook(8, per_tensor=True), s).decode() - weight).square().mean(dim=1)
        for s in (Stats(), stats)
    )
    assert seeing[:4].mean() < 0.6 * blind[:4].mean()
    assert seeing[4:].mean() > blind[4:].mean()


def test_every_value_is_the_weighted_mean_of_its_weights():
    """Where Lloyd's algorithm stops, up to the rounding of the codebook to fp16."""
    weight = random(6, 256, seed=2)
    stats = stats_for(weight)["curvature"]
    importance = stats.column_weight.double() + 0.01
    parts = Kmeans().compress(weight, Codebook(8), stats).parts
    for row, book in zip(weight.double(), parts["codebook"].double(), strict=True):
        code = (row.unsqueeze(1) - book).abs().argmin(dim=1)
        for k, value in enumerate(book):
            mine = code == k
            mean = (importance * row)[mine].sum() / importance[mine].sum()
            assert abs(mean - value) < 2e-3


def exact(weights, importance, num_values):
    """The least error of any codebook, by dynamic programming over the sorted weights."""
    order = np.argsort(weights)
    x, h = weights[order], importance[order]
    n = len(x)

    def cost(start, stop):
        mean = (h[start:stop] * x[start:stop]).sum() / h[start:stop].sum()
        return (h[start:stop] * (x[start:stop] - mean) ** 2).sum()

    costs = {(a, b): cost(a, b) for a in range(n) for b in range(a + 1, n + 1)}
    best = [0.0] + [np.inf] * n
    for _ in range(num_values):
        best = [0.0] + [min(best[a] + costs[a, b] for a in range(b)) for b in range(1, n + 1)]
    return best[n]


@pytest.mark.parametrize(("kind", "room"), [("no data", 1.15), ("curvature", 1.6)])
def test_is_close_to_the_best_codebook_there_is(kind, room):
    weight = random(4, 48, seed=3)
    stats = stats_for(weight)[kind]
    importance = torch.ones(48) if stats.column_weight is None else stats.column_weight + 0.01
    decoded = Kmeans().compress(weight, Codebook(4), stats).decode()
    ours = ((decoded - weight).square() * importance).sum(dim=1)
    least = [exact(row.double().numpy(), importance.double().numpy(), 4) for row in weight]
    assert (ours.double() >= torch.tensor(least) * (1 - 1e-3)).all()
    assert ours.mean() < room * np.mean(least)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_pruned_weights_stay_zero_and_the_others_share_the_values_left(per_tensor):
    """As well as if those that are left had a codebook of one value less to themselves."""
    weight = random(8, 256, seed=6)
    pruned = torch.where(weight.abs() > 1, weight, 0.0)
    pruned[3] = weight[3]  # a row that is not
    pruned[5] = 0
    decoded = Kmeans().compress(pruned, Codebook(8, per_tensor), Stats()).decode()
    assert ((decoded == 0) | (pruned != 0)).all()
    if per_tensor:
        return
    assert torch.equal(decoded[3], Kmeans().compress(weight[3:4], Codebook(8), Stats()).decode()[0])
    least = exact(pruned[0][pruned[0] != 0].double().numpy(), np.ones(int((pruned[0] != 0).sum())), 7)
    assert least * (1 - 1e-3) <= (decoded[0] - pruned[0]).double().square().sum() <= 1.2 * least
