"""Wanda: keeps what the textbook loop keeps, and loses less of the output than magnitude."""

import pytest
import torch

from laws import random
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.formats.bitmask import Bitmask
from tersor.formats.semi_structured import SemiStructured
from tersor.methods.magnitude import Magnitude
from tersor.methods.stats import Stats
from tersor.methods.wanda import Wanda


def inputs(num_columns):
    """Some features have much energy, some next to none, one dead."""
    x = random(200, num_columns, seed=1) * torch.logspace(-2, 1, num_columns)[torch.randperm(num_columns)]
    x[:, 3] = 0
    return x


def textbook(weight, x, num_zeros, width):
    """Row by row and group of `width` columns by group: the `num_zeros` of least `|w| * ||x||` go."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    norm = x.square().sum(0).sqrt()
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], width):
            places = range(start, start + width)
            order = sorted(places, key=lambda j: (float(weight[i, j].abs() * norm[j]), j))
            kept[i, order[:num_zeros]] = False
    return kept


def stats_of(x):
    return Stats(second_moment=x.t() @ x / len(x))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_keeps_what_the_textbook_keeps(sparsity):
    weight, x = random(10, 48), inputs(48)
    pruned = Wanda(sparsity).compress(weight, Bitmask(), stats_of(x)).decode()
    kept = textbook(weight, x, int(48 * sparsity), width=48)
    assert torch.equal(pruned, torch.where(kept, weight.half().float(), 0.0))


@pytest.mark.parametrize("pattern", [SemiStructured(2, 4), SemiStructured(4, 8)], ids=lambda pattern: pattern.name)
def test_keeps_what_the_textbook_keeps_of_every_group(pattern):
    weight, x = random(10, 48), inputs(48)
    pruned = Wanda().compress(weight, pattern, stats_of(x)).decode()
    kept = textbook(weight, x, pattern.m - pattern.n, width=pattern.m)
    assert torch.equal(pruned, torch.where(kept, weight.half().float(), 0.0))


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.33, 0.5, 0.77])
def test_every_row_loses_the_same_to_one_weight(sparsity):
    weight = random(7, 37).abs() + 0.1
    weight[0] *= 100
    zeros = (Wanda(sparsity).compress(weight, Bitmask(), Stats()).decode() == 0).sum(1)
    assert zeros.max() - zeros.min() <= 1
    assert abs(int(zeros.sum()) - sparsity * weight.numel()) < 1


@pytest.mark.parametrize("format", ["bitmask", "2:4", "4:8", "bitmask+int4-g64", "2:4+int4-g64"])
def test_the_output_suffers_less_than_from_magnitude(format):
    weight, x = random(32, 128), inputs(128)

    def error(method):
        return (x @ (method.compress(weight, FORMATS[format], stats_of(x)).decode() - weight).t()).square().sum()

    assert error(Wanda(0.5)) < 0.3 * error(Magnitude(0.5))


def test_without_a_second_moment_the_curvature_stands_in():
    weight, x = random(6, 48), inputs(48)
    energy = x.square().mean(0)
    full = Wanda().compress(weight, Bitmask(), stats_of(x))
    diagonal = Wanda().compress(weight, Bitmask(), Stats(column_weight=energy / energy.mean()))
    assert torch.equal(full.decode(), diagonal.decode())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_what_is_no_fraction_is_refused(sparsity):
    with pytest.raises(InputError, match=r"wanda: sparsity=.* is not a fraction; give one in \[0, 1\)"):
        Wanda(sparsity)
