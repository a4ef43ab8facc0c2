"""Weights that are computed from other tensors: what a layer runs on is the site, what it is computed from is none."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import tersor
from tersor.nn.copies import materialized
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe


class Doubled(nn.Module):
    """A parametrization with a layer and a bare stack of its own."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.ones(2, 16, 16))
        self.linear = nn.Linear(16, 16)

    def forward(self, weight):
        return weight * (self.stack.mean() + 1) + self.linear.weight.mean()


def masked(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.1)
    return layer


WAYS = {
    "old weight norm": weight_norm,
    "weight norm": parametrizations.weight_norm,
    "old spectral norm": spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": masked,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True) or layer,
}
LAYERS = {
    "linear": (lambda: nn.Linear(16, 16), (3, 16)),
    "narrow linear": (lambda: nn.Linear(4, 3), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(16, 16, 16, padding="same"), (2, 16, 9)),
    "narrow conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "conv transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7)),
}


def built(way, layer):
    torch.manual_seed(0)
    made = nn.Sequential(WAYS[way](LAYERS[layer][0]()), nn.Tanh())
    return made.eval(), torch.randn(LAYERS[layer][1])


class Ready:
    """A task of one batch."""

    name, output, description, fingerprint = "ready", "values", "numbers", "1"

    def __init__(self, x):
        self.x = x

    def batches(self, split, batch_size):
        return iter([self.x])

    def forward(self, model, batch):
        return model(batch).flatten(1)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_the_computed_weight_is_the_site(way, layer, tmp_path):
    model, x = built(way, layer)
    with torch.no_grad():
        model.train()(x), model.eval()  # old ones keep a weight of a graph
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(x)
        (site,) = find_sites(model)
        assert site.name == "0"
        assert torch.equal(site.weight(model), model[0].weight)
        made = tersor.compress(model, Recipe.of("gptq:int8"), Ready(x))
        torch.testing.assert_close(made.model(x), before, rtol=0, atol=0.05)
        assert torch.equal(model(x), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any("original" in key or "_orig" in key or "weight_g" in key for key in made.model.state_dict())
        tersor.save(made.model, tmp_path)
        for packed in (True, False):
            loaded = tersor.load(tmp_path, model=built(way, layer)[0], packed=packed)
            torch.testing.assert_close(loaded(x), made.model(x))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_excluded_layers_stay_as_they_are(way, tmp_path):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(WAYS[way](nn.Linear(16, 16)), nn.Linear(16, 16)).eval()  # noqa: E731
    model, x = make(), torch.randn(3, 16)
    made = tersor.compress(model, Recipe.of("int8", exclude=["0"])).model
    assert made.state_dict().keys() >= {key for key in model.state_dict() if key.startswith("0.")}
    tersor.save(made, tmp_path)
    torch.testing.assert_close(tersor.load(tmp_path, model=make())(x), made(x))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_float_file_with_the_computed_weight_is_loaded(way, tmp_path):
    """What a step leaves that trained or pruned the weight and did not pack it."""
    model, x = built(way, "linear")
    tersor.save(materialized(model), tmp_path)
    torch.testing.assert_close(tersor.load(tmp_path, model=built(way, "linear")[0])(x), model(x))


@torch.no_grad()
def test_curvature_is_that_of_the_computed_weight():
    model, x = built("weight norm", "linear")
    with torch.enable_grad():
        (stats,) = tersor.calibration.curvature.estimate_fisher(model, Ready(x)).values()
        plain = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).eval()
        plain[0].weight.data, plain[0].bias.data = model[0].weight.detach(), model[0].bias.detach()
        (expected,) = tersor.calibration.curvature.estimate_fisher(plain, Ready(x)).values()
    torch.testing.assert_close(stats.row_weight, expected.row_weight)
    assert stats.row_weight.any()


# What has no copy.


class Keeps(nn.Module):
    """A module that keeps something beside its layers."""

    def __init__(self, kept):
        super().__init__()
        self.layer, self.kept = nn.Linear(8, 8), kept

    def forward(self, x):
        y = self.layer(x)
        if isinstance(self.kept, list):
            self.kept.append({"last": (y,)})
        return y


@pytest.mark.parametrize("kept", [[], threading.Lock(), {"lock": threading.RLock()}, threading.Event()])
def test_outputs_and_locks_that_are_kept_do_no_harm(kept):
    model = nn.Sequential(Keeps(kept))
    x = torch.randn(2, 8)
    before = model(x)
    made = tersor.compress(model, Recipe.of("int8")).model
    torch.testing.assert_close(made(x), before, rtol=0, atol=0.05)


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(Keeps(iter(range(3))), Keeps(each for each in range(3)))
    with pytest.raises(tersor.TersorError, match=r"the attribute 1\.kept \(generator\) cannot be copied"):
        tersor.compress(model, Recipe.of("int8"))
