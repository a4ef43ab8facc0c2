"""The laws of every observer, over the table."""

import math
import re

import pytest
import torch
from observed import EVERYTHING, SAMPLES, random, stats_of

from tersor.activations.histogram import Histogram
from tersor.activations.observers import OBSERVERS
from tersor.activations.quantizers import IntStatic
from tersor.core.errors import DataError, InputError, UnknownName
from tersor.methods.stats import Stats
from tersor.schemes.scheme import Scheme

ALL = pytest.mark.parametrize("name", OBSERVERS)


@ALL
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_range_holds_zero_and_lies_within_what_was_seen(name, bits, kind):
    x, observer = SAMPLES[kind], OBSERVERS[name]()
    low, high = observer.range(stats_of(x), IntStatic(bits))
    slack = 2 * x.abs().max().item() / 2**12  # a bin of the histogram
    assert low <= 0 <= high
    assert low >= min(x.min().item(), 0) - slack
    assert high <= max(x.max().item(), 0) + slack
    params = IntStatic(bits).fit(stats_of(x), observer)
    assert not IntStatic(bits).fake_quantize(torch.zeros(4), params).any(), "zero stays exact"
    assert IntStatic(bits).fake_quantize(x, params).isfinite().all()


@ALL
def test_what_it_reads_is_what_it_needs(name):
    observer = OBSERVERS[name]()
    assert observer.needs <= EVERYTHING
    x = SAMPLES["heavy tails"]
    whole = stats_of(x)
    only = Stats(**{field: getattr(whole, field) for field in observer.needs})
    assert observer.range(only, IntStatic(8)) == observer.range(whole, IntStatic(8))


@ALL
def test_a_range_scales_with_its_inputs(name):
    """Twice the inputs, twice the range: powers of two are exact."""
    once = OBSERVERS[name]().range(stats_of(SAMPLES["gaussian"]), IntStatic(8))
    twice = OBSERVERS[name]().range(stats_of(2 * SAMPLES["gaussian"]), IntStatic(8))
    assert twice == pytest.approx([2 * end for end in once], rel=1e-6)


@ALL
def test_a_sample_alone_will_do(name):
    low, high = OBSERVERS[name]().range(Stats(sample=SAMPLES["gaussian"]), IntStatic(8))
    assert -6 < low < -2 < 2 < high < 6


@ALL
def test_nothing_seen_is_refused_with_the_way_out(name):
    for stats in (Stats(), Stats(sample=torch.zeros(0, 8))):
        with pytest.raises(InputError, match=r"int8-static needs calibration.*use int8-dynamic"):
            OBSERVERS[name]().range(stats, IntStatic(8))


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(name, bad):
    x = SAMPLES["gaussian"].clone()
    x[3, 3] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        OBSERVERS[name]().range(stats_of(x), IntStatic(8))


@ALL
def test_schemes_spell_it(name):
    scheme = Scheme.parse(f"int8/{name}:int8-static")
    assert scheme.observer == OBSERVERS[name]()
    assert str(scheme) == f"mse:int8/{name}:int8-static"
    assert Scheme.parse(str(scheme)) == scheme


def test_schemes_spell_options():
    text = "mse:int8/percentile(percentile=99.9):int4-static"
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8/percentil:int8-static", "did you mean 'percentile'"),
        ("int8/percentile(share=3):int8-static", "unknown option of percentile 'share'"),
        ("int8/percentile(percentile=101):int8-static", "percentile=101 is not in 50 < percentile <= 100"),
        ("int8/percentile(percentile=nan):int8-static", "percentile=nan is not a number"),
        ("int8/moving-average(momentum=1):int8-static", "momentum=1 is not in 0 <= momentum < 1"),
        ("int8/percentile:int8-dynamic", "observers choose the range of int8-static"),
        ("int8/percentile:fp8-e4m3-static", "leave out 'percentile:'"),
        ("int8/percentile:", "unknown activation format ''"),
        ("int8/:int8-static", "is not an observer"),
    ],
)
def test_misspelled_schemes_say_the_way_out(text, message):
    with pytest.raises((InputError, UnknownName), match=re.escape(message)):
        Scheme.parse(text)


def test_the_histogram_does_not_depend_on_how_inputs_come():
    """In one part, or in many, the largest first or last."""
    x = torch.cat([0.01 * random(100, 8), random(100, 8, seed=1), 30 * random(100, 8, seed=2)])
    expected = stats_of(x).histogram
    for order in (range(300), reversed(range(300))):
        histogram = Histogram()
        for row in order:
            histogram.add(x[row])
        assert torch.equal(histogram.table(), expected)
    values, counts = expected
    assert counts.sum() == x.numel()
    width = 2 * 2.0 ** (math.floor(math.log2(x.abs().max().item())) + 1) / 2**13
    assert (values - values.clamp(x.min() - width / 2, x.max() + width / 2)).abs().max() == 0
    assert (values * counts).sum() == pytest.approx(x.double().sum().item(), abs=0.5 * width * x.numel())
