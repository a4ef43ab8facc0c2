"""Hints name a cure that is not in use already, and say where a smaller model takes more memory."""

import pytest

from tersor.measure.latency import Latency
from tersor.measure.scorecard import Scorecard
from tersor.report.card import comparison
from tersor.report.hints import hints
from tersor.steps.site_report import SiteReport


def card(peak, low, high):
    latency = [made_latency(low, high)]
    return Scorecard("m", 100, None, 100, 10, 10, 10, peak, latency, "mean", 1.0, (1.0, 1.0), 10)


def made_latency(low, high):
    latency = Latency.__new__(Latency)
    values = {"batch_size": 1, "num_threads": 1, "p50": 1.0, "p95": 2.0, "speedup": 1.0}
    for name, value in {**values, "speedup_interval": (low, high)}.items():
        object.__setattr__(latency, name, value)
    return latency


def site(activation, kind="linear"):
    return SiteReport("a", kind, (8, 8), "gptq:int8", activation, 64, 8.0, 0.01)


@pytest.mark.parametrize(
    ("sites", "said", "not_said"),
    [
        ([site(None)], "int8-dynamic computes on packed weights", "inputs are rounded"),
        ([site(None, "conv")], "decodes once", "int8-dynamic"),
        ([site("int8-dynamic")], "inputs are rounded to integers", "int8-dynamic"),
        ([site("int8-static", "conv")], "tersor export", "int8-dynamic"),
        ([site("int8-dynamic"), site(None)], "decodes once", "int8-dynamic"),
    ],
)
def test_the_cure_is_not_the_one_in_use(sites, said, not_said):
    (hint,) = hints(card(100, 1, 1), card(100, 0.5, 0.7), sites)
    assert hint.startswith("slower: ")
    assert said in hint
    assert not_said not in hint


def test_more_memory_than_the_original_is_said():
    (hint,) = hints(card(1000, 1, 1), card(2000, 1.2, 1.3), [site(None)])
    assert hint.startswith("more memory: a pass took 2.00 kB at most, the original's 1.00 kB")
    assert hints(card(1000, 1, 1), card(900, 0.9, 1.1), [site(None)]) == []


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.9, 1.1, "no difference measured"),
        (0.1, 1.5, "cannot tell: 1.00x"),
        (2.0, 3.0, "1.00x [2.00, 3.00] the speed"),
    ],
)
def test_no_difference_is_said_only_where_the_interval_is_narrow(low, high, said):
    assert said in comparison(card(1, 1, 1), card(1, low, high))[-1][2]
