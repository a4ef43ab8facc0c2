import pytest
import torch
from observed import random

from tersor.activations.observers.moving_average import MovingAverage
from tersor.activations.quantizers import IntStatic
from tersor.methods.stats import Stats


def test_it_is_the_textbook_average_over_runs():
    ranges = torch.stack([-random(20).abs(), random(20, seed=1).abs()], 1)
    low, high = ranges[0].tolist()
    for run_low, run_high in ranges[1:].tolist():
        low, high = 0.9 * low + 0.1 * run_low, 0.9 * high + 0.1 * run_high
    assert MovingAverage().range(Stats(ranges=ranges), IntStatic(8)) == pytest.approx((low, high))


def test_without_momentum_the_last_run_counts_alone():
    ranges = torch.tensor([[-9.0, 9.0], [-1.0, 2.0]])
    assert MovingAverage(momentum=0).range(Stats(ranges=ranges), IntStatic(8)) == (-1, 2)


def test_one_far_run_counts_little():
    ranges = torch.tensor([[-1.0, 1.0]] * 10 + [[-100.0, 100.0]] + [[-1.0, 1.0]] * 20)
    low, high = MovingAverage().range(Stats(ranges=ranges), IntStatic(8))
    assert -3 < low < -1 < 1 < high < 3
