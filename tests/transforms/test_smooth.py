import pytest
import torch
from models import measured, model_of

from tersor.core.errors import InputError
from tersor.methods.stats import Stats
from tersor.nn.connections.connection import Connection, find_connections
from tersor.nn.parameters import matrix
from tersor.transforms.smooth import Smooth, int8_error


def test_the_ranges_are_those_of_the_paper():
    """After alpha = 1/2, every input feature has the range of its column, up to one constant."""
    model = model_of("llama")
    stats = measured(model, "llama")
    Smooth(alpha=0.5).apply(model, stats)
    after = measured(model, "llama")
    for pair in find_connections(model):
        if pair.heads > 1:
            continue  # two heads of queries share a factor
        columns = torch.stack([matrix(model.get_submodule(path)).abs().amax(0) for path in pair.readers]).amax(0)
        ratio = after[pair.readers[0]].largest / columns
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


@pytest.fixture
def outliers():
    """Inputs with a feature a hundred times larger than the rest, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 64, generator=generator)
    x[:, 5] *= 100
    return Stats(sample=x, largest=x.abs().amax(0)), torch.randn(48, 64, generator=generator)


def test_an_outlier_feature_no_longer_spoils_the_rest(outliers):
    stats, weight = outliers
    pair = Connection("norm", ("linear",), 64)
    plain = int8_error(stats, weight, torch.ones(64))
    half = int8_error(stats, weight, Smooth(alpha=0.5).factor(pair, [weight], stats))
    searched = int8_error(stats, weight, Smooth().factor(pair, [weight], stats))
    assert half < 0.1 * plain
    assert searched <= half


def test_the_search_is_never_worse_than_nothing():
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    weight = torch.eye(64)
    weight[0, 1:] = 1e-3
    pair, stats = Connection("norm", ("linear",), 64), Stats(sample=x, largest=x.abs().amax(0))
    factor = Smooth().factor(pair, [weight], stats)
    plain = int8_error(stats, weight, torch.ones(64))
    assert int8_error(stats, weight, factor) <= plain


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_impossible_alphas_are_refused(alpha):
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        Smooth(alpha=alpha)
