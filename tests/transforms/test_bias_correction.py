"""Bias correction: the mean output is that of the original weight, whatever rounding did to it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersor
from laws import random, same_bits
from tersor.core.errors import DataError
from tersor.formats.int_group import IntGroup
from tersor.recipe import Recipe
from tersor.transforms.bias_correction import corrected_bias
from test_walk import Toy


def test_the_mean_output_is_that_of_the_original():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=generator).relu()
    weight, bias = torch.randn(8, 32, generator=generator), torch.randn(8, generator=generator)
    rough = IntGroup(2).fake_quantize(weight, IntGroup(2).fit(weight))
    mean = F.linear(x, weight, bias).mean(0)
    new_bias = corrected_bias(bias, rough - weight, x.mean(0))
    assert new_bias.dtype is bias.dtype
    assert (F.linear(x, rough, bias).mean(0) - mean).abs().max() > 0.1
    torch.testing.assert_close(F.linear(x, rough, new_bias).mean(0), mean, rtol=1e-4, atol=1e-5)


def test_every_group_of_a_convolution_has_a_mean_of_its_own():
    x = random(50, 6, 9, 9).double() + torch.arange(6).view(-1, 1, 1)
    weight, bias, error = random(8, 3, 3, 3, seed=1).double(), random(8).double(), random(8, 27, seed=2)
    patches = F.unfold(x, 3).unflatten(1, (2, 27)).mean((0, 3))
    new_bias = corrected_bias(bias, error, patches)
    rough = F.conv2d(x, weight + error.view_as(weight), new_bias, groups=2)
    torch.testing.assert_close(rough.mean((0, 2, 3)), F.conv2d(x, weight, bias, groups=2).mean((0, 2, 3)))


# In the loop.

LAYERS = {  # with the axis of their outputs' features
    "linear": (lambda: nn.Linear(16, 6), (40, 16), -1),
    "tokens": (lambda: nn.Linear(16, 6), (8, 5, 16), -1),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (8, 4, 7, 7), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (8, 4, 7, 7), 1),
    "depthwise": (lambda: nn.Conv1d(6, 12, 3, groups=6), (8, 6, 20), 1),
}


def compressed(model, x, scheme="nearest:int3", bias_correction=True):
    return tersor.compress(model, Recipe.of(scheme, bias_correction=bias_correction), Toy((x,))).model


@torch.no_grad()
def means(model, x, axis=-1):
    """Of every feature of the output, in float64."""
    return copy.deepcopy(model).double()(x.double()).movedim(axis, 0).flatten(1).mean(1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sites_mean_output_is_the_floats(name):
    make, shape, axis = LAYERS[name]
    model, x = nn.Sequential(make()), random(*shape).exp()
    wanted = means(model, x, axis)
    assert (means(compressed(model, x, bias_correction=False), x, axis) - wanted).abs().max() > 0.01
    torch.testing.assert_close(means(compressed(model, x), x, axis), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("batches", ["at once", "one by one"])
def test_each_site_sees_what_the_sites_before_it_became(batches, monkeypatch):
    if batches == "one by one":
        monkeypatch.setattr("tersor.calibration.plan.MEMORY_LIMIT", 1)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5)), random(40, 12).exp()
    small = compressed(model, x)
    with torch.no_grad():
        inputs = small[:2](x)
    torch.testing.assert_close(means(small[0], x), means(model[0], x), rtol=0, atol=2e-6)
    if batches == "at once":
        torch.testing.assert_close(means(small[2], inputs), means(model[2], inputs), rtol=0, atol=2e-6)


def test_only_biases_that_are_there_and_whose_method_does_not_repair_by_itself():
    model, x = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 5)), random(40, 12).exp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = tersor.compress(model, Recipe.of("nearest:int3", {"2": "gptq:int3"}, bias_correction=True), Toy((x,))).model
    assert small[1].bias is None
    assert not torch.equal(small[0].bias, model[0].bias)
    assert torch.equal(small[2].bias, model[2].bias)
    assert small[0].bias.requires_grad
    assert all(same_bits(before[name], tensor) for name, tensor in model.state_dict().items())
    alone = compressed(nn.Sequential(model[2]), random(40, 8).exp(), "gptq(upstream_correction=0):int3")
    assert not torch.equal(alone[0].bias, model[2].bias)


def test_a_bias_used_twice_stays():
    layer = nn.Linear(8, 8)
    small = compressed(nn.Sequential(layer, nn.Tanh(), layer), random(40, 8).exp())
    assert torch.equal(small[0].bias, layer.bias)


def test_the_new_bias_is_saved(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5))  # noqa: E731
    model, x = make(), random(40, 12).exp()
    small = compressed(model, x)
    tersor.save(small, tmp_path)
    loaded = tersor.load(tmp_path, model=make())
    for layer in (0, 2):
        assert not torch.equal(loaded[layer].bias, model[layer].bias)
        assert same_bits(loaded[layer].bias, small[layer].bias)


def test_means_that_are_not_numbers_name_the_site_and_a_way_out():
    x = random(40, 12)
    x[3, 4] = torch.inf
    with pytest.raises(DataError, match=r"0: the mean of the inputs is not finite: .*; use other data.*--exclude '0'"):
        compressed(nn.Sequential(nn.Linear(12, 4)), x)
