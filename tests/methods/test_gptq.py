"""GPTQ: less output error than any rounding that does not look at the inputs, on every grid."""

import pytest
import torch

from laws import random, same_parts
from tersor.core.errors import DataError, InputError
from tersor.formats import FORMATS
from tersor.formats.codebook import Codebook
from tersor.formats.contract import Grid
from tersor.methods.gptq import Gptq
from tersor.methods.kmeans import Kmeans
from tersor.methods.mse import Mse
from tersor.methods.nearest import Nearest
from tersor.methods.stats import Stats

# 256 values for a row of 96 weights leave nothing to gain.
GRIDS = [name for name, format in FORMATS.items() if isinstance(format, Grid) and name != "codebook256"]


def inputs(num_tokens=400, num_columns=96, seed=1):
    """Correlated features of different energy."""
    mixing = random(num_columns, num_columns, seed=seed) / num_columns**0.5 + 0.5 * torch.eye(num_columns)
    energy = torch.logspace(-1, 1, num_columns)[torch.randperm(num_columns, generator=torch.Generator().manual_seed(3))]
    return (random(num_tokens, num_columns, seed=seed + 1) @ mixing) * energy


def stats_of(x, original=None):
    cross = None if original is None else original.t() @ x / len(x)
    return Stats(second_moment=x.t() @ x / len(x), cross_moment=cross, num_tokens=len(x))


def heavy_tailed(num_rows, num_columns):
    return random(num_rows, num_columns) / random(num_rows, num_columns, seed=5).abs().clamp_min(0.2)


def width(format):
    return 96 if format.why_not((12, 96)) is None else 256


def searching(format):
    return Kmeans() if isinstance(format, Codebook) else Mse()


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_beats_mse_beats_nearest(name):
    """In the error of the output, on inputs that neither saw."""
    format = FORMATS[name]
    weight = heavy_tailed(12, width(format))
    x, unseen = inputs(1600, width(format)).split(800)
    energy = x.square().mean(0)
    searched = Stats(column_weight=energy / energy.mean())

    def error(encoded):
        return ((encoded.decode() - weight) @ unseen.t()).square().sum().item()

    nearest = error(Nearest().compress(weight, format, Stats()))
    mse = error(searching(format).compress(weight, format, searched))
    gptq = error(Gptq().compress(weight, format, stats_of(x)))
    assert mse <= nearest * (1.1 if name.startswith(("int8", "fp8")) else 1.001)  # a clip that hardly matters there
    assert gptq < 0.8 * mse


@pytest.mark.parametrize("name", GRIDS)
def test_without_correlations_it_is_no_worse_than_the_search(name):
    format = FORMATS[name]
    weight = heavy_tailed(6, width(format))

    def error(encoded):
        return (encoded.decode() - weight).square().sum().item()

    searched = error(searching(format).compress(weight, format, Stats()))
    for stats in (Stats(), Stats(second_moment=torch.eye(width(format)))):
        assert error(Gptq().compress(weight, format, stats)) <= searched * 1.03  # gptq tries fewer ranges


@pytest.mark.parametrize("name", ["int4-g64", "int3-asym", "nf4", "codebook16"])
def test_the_same_bytes_every_time(name):
    weight, stats = heavy_tailed(8, 96), stats_of(inputs())
    made = [Gptq().compress(weight, FORMATS[name], stats).parts for _ in range(2)]
    assert same_parts(*made)


def test_rounds_of_rescaling_help_at_two_bits():
    weight, x, format = random(16, 128), inputs(800, 128), FORMATS["int2-g64"]

    def error(num_rounds):
        encoded = Gptq(num_rounds=num_rounds).compress(weight, format, stats_of(x))
        return ((encoded.decode() - weight) @ x.t()).square().sum().item()

    assert error(2) < 0.95 * error(0)


def test_upstream_correction_repairs_what_was_lost_before():
    weight, original, format = random(16, 96), inputs(1000), FORMATS["int4-g32"]
    x = original + 0.3 * original.std(0) * random(1000, 96, seed=8)

    def error(share):
        encoded = Gptq(upstream_correction=share).compress(weight, format, stats_of(x, original))
        return (original @ weight.t() - x @ encoded.decode().t()).square().sum().item()

    assert error(1.0) < error(0.5) < error(0.0)


@pytest.mark.parametrize("kind", ["fewer tokens than features", "dead features", "one token"])
def test_poor_statistics_do_no_harm(kind):
    """Never worse than rounding to nearest, on the tokens that were seen."""
    x = inputs(1 if kind == "one token" else 20)
    if kind == "dead features":
        x[:, ::2] = 0
    weight = random(8, 96)

    def error(encoded):
        return ((encoded.decode() - weight) @ x.t()).square().sum().item()

    for name in ("int4-g32", "nf4", "codebook8"):
        gptq = Gptq().compress(weight, FORMATS[name], stats_of(x, x))
        assert error(gptq) <= error(Nearest().compress(weight, FORMATS[name], Stats()))
        assert (gptq.decode() - weight).abs().max() < 2 * weight.abs().max()


def test_statistics_that_are_not_numbers_are_refused():
    with pytest.raises(DataError, match=r"second moment of the inputs is not finite: the model overflows"):
        Gptq().compress(random(2, 8), FORMATS["int4"], Stats(second_moment=torch.full((8, 8), torch.nan)))


@pytest.mark.parametrize(
    "options", [{"damping": -1}, {"upstream_correction": 1.5}, {"num_rounds": -1}, {"damping": float("nan")}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match="must be 0 or more"):
        Gptq(**options)
