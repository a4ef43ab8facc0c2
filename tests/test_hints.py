"""Hints name a cure that is not in use already, and say where a smaller model takes more memory."""

import pytest

from tersor.analysis import roofline
from tersor.core import processor
from tersor.measure.latency import Latency
from tersor.measure.scorecard import Scorecard
from tersor.report.card import comparison
from tersor.report.hints import hints, slow_here
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
        ([site(None)], "int8-dynamic computes on packed weights", "rounding the inputs"),
        ([site(None, "conv")], "decodes once", "int8-dynamic"),
        ([site("int8-dynamic")], "rounding the inputs to integers costs more", "int8-dynamic"),
        ([site("int8-static", "conv")], "tersor export", "int8-dynamic"),
        ([site("int8-dynamic"), site(None)], "decodes once", "int8-dynamic"),
    ],
)
def test_the_cure_is_not_the_one_in_use(sites, said, not_said):
    (hint,) = hints(card(100, 1, 1), card(100, 0.5, 0.7), sites)
    assert hint.startswith("slower: ")
    assert said in hint
    assert not_said not in hint


@pytest.fixture
def processor_with(monkeypatch):
    """Has the processor have these instructions alone."""

    def have(*names):
        monkeypatch.setattr(processor, "instruction_sets", lambda: names)

    return have


def test_the_cause_is_the_processors_where_it_has_no_int8_products(processor_with):
    processor_with("avx2", "fma")
    (hint,) = hints(card(100, 1, 1), card(100, 0.5, 0.7), [site("int8-dynamic")])
    assert "no instructions for int8 products (avx2, fma): int8 layers can be about 2 times as fast" in hint
    assert slow_here(["int8-dynamic", "int8-static"])[0].startswith("int8-dynamic, int8-static: this processor has no")
    assert slow_here([]) == []
    processor_with("avx2", "fma", "avx512", "vnni")
    (hint,) = hints(card(100, 1, 1), card(100, 0.5, 0.7), [site("int8-dynamic")])
    assert "no instructions" not in hint
    assert slow_here(["int8-dynamic"]) == []


@pytest.mark.parametrize(
    ("names", "int8", "bf16"),
    [
        (("avx2", "fma"), 2, 1),
        (("avx2", "avx512", "vnni"), 4, 1),
        (("avx2", "avx512", "vnni", "bf16"), 4, 2),
        (("neon",), 2, 1),
        (("neon", "dotprod"), 4, 1),
        (("neon", "dotprod", "i8mm", "bf16"), 8, 2),
        ((), 1, 1),
    ],
)
def test_products_are_bounded_by_instructions(processor_with, names, int8, bf16):
    processor_with(*names)
    assert (processor.times_float("int8"), processor.times_float("bf16")) == (int8, bf16)
    assert processor.times_float("fp32") == 1


def test_a_slow_kernel_is_no_bound_of_the_processor(processor_with, monkeypatch):
    """Where a product of torch takes a second, the peak is what an instruction could do."""
    processor_with("avx2", "fma")
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    slow = {"n": 0}

    def fastest(call, clock):
        slow["n"] += 1
        return 1.0 if slow["n"] in (4, 5) else 1e-3  # bf16 and int8

    monkeypatch.setattr(roofline, "fastest", fastest)
    peaks = roofline.measure_peaks(1)
    assert peaks.macs["int8"] == 2 * peaks.macs["fp32"]
    assert peaks.macs["bf16"] == peaks.macs["fp32"]


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
