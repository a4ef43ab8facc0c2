"""Folding, equalization, bias correction and static inputs together: conv nets in int8 from end to end."""

import copy

import pytest
import torch
from models import MODELS
from torch import nn

import tersor
from laws import random
from tersor.activations.observers import OBSERVERS
from tersor.recipe import Recipe
from test_walk import Toy

NETS = {
    "resnet": ["fold-bn", "equalize"],
    "mobilenet": ["fold-bn", "equalize"],
    "mobilenet, relu6": ["fold-bn"],
    "plain": ["equalize"],
}


def net(name):
    """Uneven channels and batch-norm statistics that are not the initial ones, float32."""
    model = MODELS[name].model().float()
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 5, generator=generator)
    return model.eval()


@torch.no_grad()
def error(model, small, x):
    exact = model(x)
    return ((small(x) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_whole_chain_stays_near_the_float_model(name, observer, tmp_path):
    """Depthwise and grouped convolutions included; what is read back is what was made."""
    model, x = net(name), random(64, 3, 10, 10)
    recipe = Recipe.of(f"int8/{observer}:int8-static", transforms=NETS[name], bias_correction=True)
    small = tersor.compress(model, recipe, Toy((x,))).model
    convs = [m for m in small.modules() if getattr(m, "kernel_size", None) and hasattr(m, "packed")]
    assert convs
    assert all(conv.input_quantizer.format == "int8-static" for conv in convs)
    most = 0.6 if observer == "entropy" else 0.1  # a histogram of so few numbers has it clip too much
    assert error(model, small, random(64, 3, 10, 10, seed=1)) < most
    tersor.save(small, tmp_path)
    loaded = tersor.load(tmp_path, model=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


def test_bias_correction_takes_back_what_static_inputs_do_to_the_mean():
    """Of the output of a conv net in few bits."""
    model, x = net("plain"), random(64, 3, 10, 10)

    @torch.no_grad()
    def shift(bias_correction):
        recipe = Recipe.of("nearest:int4/int8-static", bias_correction=bias_correction)
        small = tersor.compress(model, recipe, Toy((x,))).model
        return (small(x) - model(x)).mean((0, 2, 3)).abs().mean().item()

    assert shift(True) < 0.5 * shift(False)


def test_observers_see_all_calibration_data_of_a_convolution():
    """Not only the few hundred patches of the sample."""
    model, x = net("plain"), random(64, 3, 10, 10)
    x[50, 1, 4, 4] = 1000
    params = {}
    for observer in ("min-max", "percentile(percentile=99.9)"):
        small = tersor.compress(model, Recipe.of(f"int8/{observer}:int8-static"), Toy((x,))).model
        params[observer] = small[0].input_quantizer.activation.params["scale"].item()
    assert params["min-max"] > 1000 / 256
    assert params["percentile(percentile=99.9)"] < 1
