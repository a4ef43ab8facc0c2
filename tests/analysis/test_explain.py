"""Explaining a run: its kinds of work add up, the advice is Amdahl's law on a planted share, and a packed model that
is slower is told why."""

import pytest
import torch
from torch import nn

import tersor
from tersor.analysis.explain import KINDS, account, explain, growth
from tersor.analysis.roofline import Peaks
from tersor.runtimes.contract import LayerTime, Profile
from tersor.runtimes.feeds import synthetic_feeds
from tersor.runtimes.torch import TorchSession

PEAKS = Peaks("cpu", "2", 1, {"fp32": 100e9, "bf16": 200e9, "int8": 400e9}, {2**30: 10e9})


def product(seconds, precision="fp32", weights="float", kernel="linear", macs=10**6, name="layer"):
    return LayerTime(name, "Linear", "product", seconds, kernel, precision, weights, macs, 1000)


def other(seconds, part="other", name="layer"):
    return LayerTime(name, "", part, seconds)


def profile(*layers, seconds):
    return Profile(tuple(layers), seconds, len(layers))


def test_kinds_add_up_to_the_run_and_the_rest_is_between_layers():
    layers = [
        product(1.0),
        product(2.0, "int8", "packed"),
        product(3.0, weights="packed"),
        product(0.5, weights=""),
        other(0.25, "decode"),
        other(0.125, "quantize"),
        other(0.0625),
    ]
    found = account(profile(*layers, seconds=8.0), PEAKS)
    assert list(found.kinds) == list(KINDS)
    expected = [2.0, 3.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 8 - 6.9375]
    assert list(found.kinds.values()) == expected
    assert sum(found.kinds.values()) == found.seconds == 8.0


def test_layers_that_took_longer_than_the_run_leave_nothing_between_them():
    found = account(profile(product(1.0), other(1.0), seconds=1.9), PEAKS)
    assert found.kinds["between layers"] == 0
    assert found.seconds == 2.0


@pytest.mark.parametrize(
    ("layers", "words", "at_most"),
    [
        ([other(0.5, "decode"), product(0.5, weights="packed")], "do not decode", 2.0),
        ([other(0.75, "quantize"), product(0.25, "int8", "packed")], "quantizing inputs", 4.0),
        ([product(0.8, name="head"), product(0.2, "int8", "packed")], "left in float, first head", 1 / (0.2 + 0.8 / 4)),
        ([product(0.2)], "fewer operators", 5.0),
        ([other(0.9), product(0.1)], "norms, activations", 10.0),
        ([product(0.9, "int8", "packed", "MatMul int8 x int8"), other(0.1)], "unsigned inputs", 10.0),
        ([product(0.9, "int8", "packed", "MatMul uint8 x int8"), other(0.1)], "faster kernel", 10.0),
    ],
)
def test_the_first_advice_is_amdahls_law_on_the_planted_share(layers, words, at_most):
    advice = account(profile(*layers, seconds=1.0), PEAKS).advice
    assert words in advice[0].change
    assert advice[0].at_most == pytest.approx(at_most, rel=0.01)
    assert 1 <= len(advice) <= 2
    assert advice == tuple(sorted(advice, key=lambda each: -each.at_most))


def test_a_run_at_its_roofline_is_given_no_advice():
    best = product(1.0, "int8", "packed", "MatMul uint8 x int8", macs=400 * 10**9)
    assert account(profile(best, seconds=1.0), PEAKS).advice == ()


def test_growth_names_what_grew_and_takes_all_products_together():
    before = account(profile(product(1.0), other(0.1), seconds=1.1), PEAKS)
    after = account(profile(product(0.4, "int8", "packed"), other(0.9, "quantize"), other(0.1), seconds=1.4), PEAKS)
    grown = growth(before, after)
    assert grown[0] == ("quantize", pytest.approx(0.9))
    assert dict(grown)["products with weights"] == pytest.approx(-0.6)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()


def test_a_weight_only_model_that_is_slower_is_told_that_decoding_is_why(one_thread):
    model = wide()
    packed = tersor.compress(wide(), tersor.Recipe.of("nf4")).model
    found = []
    for each in (model, packed):
        session = TorchSession(each, "wide")
        found.append(explain(session, synthetic_feeds(session.inputs), PEAKS, seconds=0.3))
    assert growth(*found)[0][0] == "decode"
    assert "do not decode" in found[1].advice[0].change
    assert found[1].kinds["decode"] > 0.5 * found[1].seconds
    assert found[0].kinds["decode"] == 0


def test_macs_of_all_layers_are_those_of_the_model(one_thread):
    session = TorchSession(wide(), "wide")
    found = explain(session, synthetic_feeds(session.inputs, batch_size=3), PEAKS, seconds=0.1)
    assert sum(layer.time.macs for layer in found.layers) == 3 * 2 * 512 * 1024
    assert all(layer.bound is not None for layer in found.layers if layer.time.macs)
    assert torch.get_num_threads() == 1
