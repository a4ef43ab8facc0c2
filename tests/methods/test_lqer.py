"""LQER: the correction repairs what the outputs see, more of it with every rank."""

from itertools import pairwise

import pytest
import torch

from laws import random
from tersor.core.errors import InputError
from tersor.formats.int_group import IntGroup
from tersor.formats.lowrank import Corrected, LowRank
from tersor.methods.gptq import Gptq
from tersor.methods.lqer import Lqer
from tersor.methods.mse import Mse
from tersor.methods.stats import Stats

FORMAT = Corrected(IntGroup(2, 64))


def inputs():
    return random(400, 96, seed=1) @ (random(96, 96, seed=2) * torch.logspace(-1, 1, 96))


def stats_of(x, **more):
    return Stats(second_moment=x.t() @ x / len(x), **more)


def output_error(encoded, weight, x):
    return float((x @ (encoded.decode() - weight).t()).square().sum())


@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
def test_the_error_falls_with_the_rank(data):
    weight, x = random(48, 96), inputs() if data else torch.eye(96)
    stats = stats_of(x) if data else Stats()
    errors = [output_error(Lqer(rank=rank).compress(weight, FORMAT, stats), weight, x) for rank in (0, 2, 8, 24, 48)]
    assert all(more < less for less, more in pairwise(errors))
    assert errors[-1] < 1e-4 * errors[0]


@pytest.mark.parametrize("data", [True, False], ids=["gptq", "mse"])
def test_rank_zero_is_the_base(data):
    weight, stats = random(16, 96), stats_of(inputs()) if data else Stats()
    base = (Gptq() if data else Mse()).compress(weight, FORMAT.base, stats)
    encoded = Lqer(rank=0).compress(weight, FORMAT, stats)
    assert torch.equal(encoded.decode(), base.decode())


def test_it_repairs_what_the_outputs_see():
    """Better than the plain SVD of the same error."""
    weight, x = random(48, 96), inputs()
    base = Gptq().compress(weight, FORMAT.base, stats_of(x))
    plain = FORMAT.join(base, LowRank().fit(weight - base.decode(), 8))
    ours = Lqer(rank=8).compress(weight, FORMAT, stats_of(x))
    assert output_error(ours, weight, x) < 0.95 * output_error(plain, weight, x)


def test_it_repairs_the_drift_as_well():
    """Where the inputs differ from the original model's, the target is what gives the original outputs."""
    weight, original = random(48, 96), inputs()
    x = original + 0.3 * random(*original.shape, seed=5) * original.std(0)
    stats = stats_of(x, cross_moment=original.t() @ x / len(x))

    def error(encoded):
        return float((x @ encoded.decode().t() - original @ weight.t()).square().sum())

    drifted, blind = (Lqer(rank=16).compress(weight, FORMAT, s) for s in (stats, stats_of(x)))
    assert error(drifted) < 0.95 * error(blind)


def test_bytes_are_those_of_the_base_and_two_factors():
    weight = random(48, 96)
    encoded = Lqer(rank=5).compress(weight, FORMAT, Stats())
    base = Mse().compress(weight, FORMAT.base, Stats())
    assert encoded.num_bytes == base.num_bytes + 2 * 5 * (48 + 96)
    assert Lqer(rank=500).compress(weight, FORMAT, Stats()).parts["left"].shape[1] == 48


def test_impossible_options_are_refused():
    with pytest.raises(InputError, match="0 or more"):
        Lqer(rank=-1)
