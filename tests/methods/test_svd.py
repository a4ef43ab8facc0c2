"""SVD: the best factors for the outputs, by a judge that knows nothing of eigenvectors."""

import pytest
import torch

from laws import random
from tersor.core.errors import DataError, InputError
from tersor.formats.lowrank import LowRank
from tersor.methods.stats import Stats
from tersor.methods.svd import Svd

SHAPES = [(12, 20), (20, 12)]


def inputs(num_columns, num_tokens=300):
    """Correlated, of very different sizes."""
    mix = random(num_columns, num_columns, seed=1) * torch.logspace(-1, 1, num_columns)
    return random(num_tokens, num_columns, seed=2) @ mix


def stats_of(weight, x, rows=False):
    row_weight = random(weight.shape[0], seed=3).square() if rows else None
    return Stats(second_moment=x.t() @ x / len(x), row_weight=row_weight)


def loss(weight, other, stats):
    """tr(D (W - W') S (W - W')' D), rows that hardly matter counted as 1 % of the average."""
    error, rows = (weight - other).double(), torch.ones(len(weight)).double()
    if stats.row_weight is not None:
        rows = stats.row_weight.double() + 0.01 * stats.row_weight.double().mean()
    moment = torch.eye(weight.shape[1]).double() if stats.second_moment is None else stats.second_moment.double()
    return float((rows.unsqueeze(1) * error * (error @ moment)).sum())


def alternating_least_squares(weight, stats, rank, num_rounds=200):
    """The judge: one factor after the other, each solved exactly with the other fixed."""
    rows = torch.ones(len(weight)).double()
    if stats.row_weight is not None:
        rows = stats.row_weight.double() + 0.01 * stats.row_weight.double().mean()
    scaled, moment = rows.sqrt().unsqueeze(1) * weight.double(), stats.second_moment.double()
    right = random(rank, weight.shape[1], seed=9).double()
    for _ in range(num_rounds):
        left = torch.linalg.solve(right @ moment @ right.t(), right @ moment @ scaled.t()).t()
        right = torch.linalg.lstsq(left, scaled).solution
    return (left @ right / rows.sqrt().unsqueeze(1)).float()


@pytest.mark.parametrize("rows", [False, True], ids=["equal rows", "row weights"])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reaches_the_optimum(shape, rank, rows):
    weight, x = random(*shape), inputs(shape[1])
    stats = stats_of(weight, x, rows)
    ours = loss(weight, Svd(rank=rank, damping=0.0).compress(weight, LowRank(), stats).decode(), stats)
    judge = loss(weight, alternating_least_squares(weight, stats, rank), stats)
    rounding = 1e-6 * loss(weight, torch.zeros_like(weight), stats)  # of the factors to fp16
    assert ours <= 1.001 * judge + rounding


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_data_helps(shape):
    weight, x = random(*shape), inputs(shape[1])
    stats = stats_of(weight, x)
    plain, whitened = (Svd(rank=4).compress(weight, LowRank(), s).decode() for s in (Stats(), stats))
    assert loss(weight, whitened, stats) < 0.6 * loss(weight, plain, stats)
    assert loss(weight, plain, Stats()) < loss(weight, whitened, Stats())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_data_it_is_the_plain_svd(shape):
    weight = random(*shape)
    ours = Svd(rank=3).compress(weight, LowRank(), Stats()).decode()
    torch.testing.assert_close(ours, LowRank().fake_quantize(weight, LowRank().fit(weight, 3)), rtol=0, atol=5e-3)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_of_few_dimensions_need_as_few_components(shape, damping):
    """A singular second moment: five components give every output there is."""
    weight, x = random(*shape), inputs(shape[1], num_tokens=5)
    ours = Svd(rank=5, damping=damping * 1e-6).compress(weight, LowRank(), stats_of(weight, x)).decode()
    assert ((ours - weight) @ x.t()).abs().max() <= 5e-3 * (weight @ x.t()).abs().max()


def test_a_dead_input_is_kept_by_damping():
    """What calibration never shows may still come: its column is not thrown away where rank allows it."""
    weight, x = random(8, 20), inputs(20)
    x[:, 0] = 0
    ours = Svd(rank=8).compress(weight, LowRank(), stats_of(weight, x)).decode()
    torch.testing.assert_close(ours, weight, rtol=0, atol=1e-2)


def test_energy_takes_as_few_components_as_hold_it():
    weight, x = random(16, 24), inputs(24)
    stats = stats_of(weight, x)
    whole = loss(weight, torch.zeros_like(weight), stats)
    for energy in (0.5, 0.9, 0.99):
        encoded = Svd(energy=energy, damping=0.0).compress(weight, LowRank(), stats)
        rank = encoded.parts["left"].shape[1]
        assert loss(weight, encoded.decode(), stats) <= (1 - energy) * whole * 1.001
        less = Svd(rank=rank - 1, damping=0.0).compress(weight, LowRank(), stats) if rank > 1 else None
        assert less is None or loss(weight, less.decode(), stats) > (1 - energy) * whole


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_ratio_is_of_the_bytes(ratio):
    weight = random(40, 64)
    encoded = Svd(ratio=ratio).compress(weight, LowRank(), Stats())
    assert ratio * 2 * 40 * 64 - 2 * (40 + 64) < encoded.num_bytes <= ratio * 2 * 40 * 64


def test_the_first_option_above_zero_decides():
    weight = random(16, 24)
    ranks = [
        method.compress(weight, LowRank(), Stats()).parts["left"].shape[1]
        for method in (Svd(rank=7, energy=0.1), Svd(rank=99), Svd(energy=1.0), Svd())
    ]
    assert ranks == [7, 16, 16, int(0.5 * 16 * 24 / 40)]


def test_bad_options_and_statistics_are_told():
    with pytest.raises(InputError, match=r"energy lie in \[0, 1\]"):
        Svd(energy=1.5)
    with pytest.raises(InputError, match="give rank, energy or ratio"):
        Svd(ratio=0.0)
    with pytest.raises(DataError, match="not finite"):
        Svd().compress(random(3, 4), LowRank(), Stats(second_moment=torch.full((4, 4), torch.nan)))
