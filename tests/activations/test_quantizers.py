"""Static activation formats: how their ranges are chosen. What all activation formats share is in laws.py."""

import copy

import pytest
import torch
from torch import nn

from tersor.activations.quantizers import ACTIVATIONS, Activation, Fp8Static, IntStatic
from tersor.checkpoint.artifact import load, save
from tersor.core.errors import ArtifactError, InputError
from tersor.formats import format_named
from tersor.kernels import choice, reference
from tersor.methods.stats import Stats
from tersor.nn.sites import find_sites


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def span(low, high):
    """Plain asymmetric int8 from low to high."""
    scale = torch.tensor([(high - low) / 255])
    return {"scale": scale, "zero_point": ((-low / scale).round() - 128).to(torch.int8)}


SAMPLES = {
    "gaussian": random(256, 64),
    "heavy tails": random(256, 64) / random(256, 64, seed=1).abs().clamp_min(0.02),
    "shifted": random(256, 64) + 5,
    "after relu": random(256, 64).relu(),
    "an outlier": torch.cat([random(255, 64), 40 + 0 * random(1, 64)]),
    "few": random(3, 5),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_searched_range_beats_min_max_and_percentiles(name):
    x = SAMPLES[name]

    def error(params):
        return (IntStatic(8).fake_quantize(x, params) - x).abs().pow(3).sum().item()

    found = error(IntStatic(8).fit(Stats(sample=x)))
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    assert found <= error(span(low, high)) * (1 + 1e-6)
    for percentile in (0.99, 0.999, 0.9999):
        ends = torch.quantile(x.flatten(), torch.tensor([1 - percentile, percentile])).tolist()
        assert found <= 1.02 * error(span(min(ends[0], 0), max(ends[1], 0)))


def test_a_one_sided_input_gets_all_codes():
    x = SAMPLES["after relu"]
    params = IntStatic(8).fit(Stats(sample=x))
    assert params["zero_point"].item() == -128
    assert IntStatic(8).quantize(x, params).max() == 127


def test_zero_is_exact():
    """Padding and dead features stay nothing."""
    for x in SAMPLES.values():
        params = IntStatic(8).fit(Stats(sample=x))
        assert not IntStatic(8).fake_quantize(torch.zeros(4), params).any()


def test_an_input_of_zeros_is_fitted():
    for name in ("int8-static", "fp8-e4m3-static"):
        params = ACTIVATIONS[name].fit(Stats(sample=torch.zeros(4, 8)))
        assert not ACTIVATIONS[name].fake_quantize(torch.zeros(2, 8), params).any()


def test_fp8_spans_what_was_seen_beside_the_sample():
    x = random(16, 8).clamp(-1, 1)
    params = Fp8Static().fit(Stats(sample=x, largest=torch.full((8,), 20.0)))
    assert Fp8Static().fake_quantize(torch.tensor([20.0, -20.0, 500.0]), params).tolist() == [20, -20, 20]


@pytest.mark.parametrize("name", ["int8-static", "fp8-e4m3-static"])
def test_without_a_sample_the_way_out_is_named(name):
    for stats in (Stats(), Stats(sample=torch.zeros(0, 8))):
        with pytest.raises(InputError, match=f"{name} needs calibration.*use {name.replace('static', 'dynamic')}"):
            ACTIVATIONS[name].fit(stats)


def layered(activation, num_in=96):
    """A linear layer in int8 with quantized inputs, in a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(num_in, 40))
    site, format = find_sites(model)[0], format_named("int8")
    weight = site.matrix(model)
    params = ACTIVATIONS[activation].fit(Stats(sample=random(64, num_in) + 1))
    site.replace(model, format.encode(weight, format.fit(weight)), Activation(activation, params))
    return model


def test_static_int8_runs_on_integers(monkeypatch):
    monkeypatch.setattr(choice, "CHOICE", choice.KernelChoice())
    monkeypatch.setattr(choice, "fastest", lambda times: "int_mm")  # whichever is, on this machine
    calls, multiply = [], torch._int_mm
    model, x = layered("int8-static"), random(7, 96)
    with torch.no_grad():
        model(x)  # here it is chosen
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append(a.shape) or multiply(a, b))
        fast = model(x)
        assert calls == [(7, 96)]
        with reference():
            slow = model(x)
    assert len(calls) == 1
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_sums_that_could_overflow_are_not_run_on_integers():
    model = layered("int8-static", num_in=70_000)
    x = torch.full((2, 70_000), 10.0)
    with torch.no_grad():
        fast = model(x)
        with reference():
            assert torch.equal(model(x), fast)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameters_survive_an_artifact(activation, tmp_path):
    model = layered(activation)
    save(model, tmp_path)
    loaded = load(tmp_path, model=nn.Sequential(nn.Linear(96, 40)))
    x = random(7, 96)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_parameters_of_another_shape_are_refused(tmp_path):
    model = layered("int8-static")
    quantizer = model[0].input_quantizer
    for name, damaged in (("scale", torch.ones(2)), ("zero_point", torch.zeros(1)), ("scale", None)):
        broken = copy.deepcopy(model)
        broken[0].input_quantizer._buffers[name] = damaged
        if damaged is None:
            del broken[0].input_quantizer._buffers[name]
        save(broken, tmp_path / "broken")
        with pytest.raises(ArtifactError, match="int8-static has the parameters"):
            load(tmp_path / "broken", model=nn.Sequential(nn.Linear(96, 40)))
    assert set(quantizer.tensors) == {"scale", "zero_point"}
