import pytest
import torch
from observed import SAMPLES, stats_of

from tersor.activations.observers import OBSERVERS
from tersor.activations.observers.least_error import CubedError, LeastSquares
from tersor.activations.quantizers import IntStatic


@pytest.mark.parametrize("kind", [kind for kind in SAMPLES if kind != "zeros"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("other", [name for name in OBSERVERS if name not in ("mse", "cubed-error")])
def test_no_other_observer_has_less_squared_error(kind, bits, other):
    x, codes = SAMPLES[kind], IntStatic(bits)

    def error(observer):
        return (codes.fake_quantize(x, codes.fit(stats_of(x), observer)) - x).square().sum().item()

    assert error(LeastSquares()) <= 1.02 * error(OBSERVERS[other]())


def test_cubes_reach_further_out_than_squares():
    x = SAMPLES["heavy tails"]
    squares, cubes = (each.range(stats_of(x), IntStatic(8)) for each in (LeastSquares(), CubedError()))
    assert cubes[0] < squares[0] < 0 < squares[1] < cubes[1]


def test_cubes_see_what_the_sample_missed():
    x = SAMPLES["gaussian"].repeat(8, 1)
    x[:, 3] += torch.linspace(0, 60, len(x)) ** 2 / 60  # a feature that is far out in a few inputs
    assert CubedError().range(stats_of(x), IntStatic(8))[1] > 30
