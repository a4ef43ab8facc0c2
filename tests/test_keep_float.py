"""Sites that stay float because of what they cost: measured, and said why."""

import pytest
import torch
from torch import nn

import tersor
from laws import random
from tersor.calibration.divergence import divergence, outputs
from tersor.core.errors import InputError
from tersor.formats import format_named
from tersor.methods.stats import Stats
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.steps.keep_float import MOST_SITES
from tersor.steps.loss_predictor import LossPredictor, predicted_loss
from tersor.steps.step_visitor import Calibration
from tersor.steps.weights import WeightsStep
from test_walk import Toy


def stack(num_layers=10, width=32):
    """Linear layers of much the same sensitivity."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(num_layers)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.linalg.qr(torch.randn(width, width)).Q)
    return nn.Sequential(*layers).eval()


def spoiled(place=4):
    """One layer has a weight that makes its row's steps too large for all others."""
    model = stack()
    with torch.no_grad():
        model[place].weight[:, 0] = 0
        model[place].weight[::2, 0] = 60.0
        model[place - 1].weight[0] = 0
        model[place - 1].bias[0] = 0
    return model


def task(seed=0):
    return Toy((random(64, 32, seed=seed),))


def made(model, scheme, keep_float, **fields):
    return tersor.compress(model, Recipe.of(scheme, keep_float=keep_float, **fields), task())


def test_the_site_to_blame_stays_float():
    model = spoiled()
    compressed = made(model, "nearest:int4", "auto")
    (choice,) = compressed.kept_float
    assert choice.kept == {"4": "keep"}
    assert choice.loss_left <= 0.5 * choice.loss
    assert type(compressed.model[4]) is nn.Linear
    assert torch.equal(compressed.model[4].weight, model[4].weight)
    assert len(compressed.sites) == 9
    assert "4 (alone" in choice.note()
    assert "float" in choice.note()


def test_what_is_left_is_what_the_finished_model_loses():
    model = spoiled()
    compressed = made(model, "nearest:int4", "auto")
    pair = (list(outputs(each, task(), "calibration", 64, 8)) for each in (model, compressed.model))
    assert compressed.kept_float[0].loss_left == pytest.approx(divergence(*pair, "values"), rel=1e-5)


def test_a_sites_loss_is_that_of_compressing_it_alone():
    model = spoiled()
    choice = made(model, "nearest:int4", 1).kept_float[0]
    original = list(outputs(model, task(), "calibration", 64, 8))
    for each in choice.sites:
        alone = tersor.compress(model, Recipe.of("keep", {each.site: "nearest:int4"}), task()).model
        assert each.measured == pytest.approx(
            divergence(original, outputs(alone, task(), "calibration", 64, 8), "values"), rel=1e-5
        )
    assert [each.measured for each in choice.sites] == sorted([s.measured for s in choice.sites], reverse=True)


def test_where_no_few_are_to_blame_none_is_kept():
    choice = made(stack(20), "nearest:int4", "auto").kept_float[0]
    assert choice.kept == {}
    assert choice.loss_left == choice.loss
    assert f"the worst {int(20 * MOST_SITES)} of 20" in choice.note()


def test_a_negligible_loss_keeps_nothing():
    choice = made(spoiled(), "bf16", "auto").kept_float[0]
    assert choice.kept == {}
    assert "negligible" in choice.note()


def test_a_number_keeps_that_many_of_the_worst():
    compressed = made(spoiled(), "nearest:int4", 3)
    choice = compressed.kept_float[0]
    assert list(choice.kept) == [each.site for each in choice.sites[:3]]
    assert len(compressed.sites) == 7
    assert made(spoiled(), "nearest:int4", 0).kept_float == []


def test_rules_and_excludes_stay():
    """An excluded site is none of those that can be kept, and another rule still holds."""
    compressed = made(spoiled(), "nearest:int4", "auto", rules={"7": "nearest:int8"}, exclude=["4"])
    assert compressed.kept_float[0].kept == {}
    assert {s.scheme for s in compressed.sites if s.name == "7"} == {"nearest:int8"}
    assert "4" not in {each.site for each in compressed.kept_float[0].sites}


def test_a_static_input_to_blame_becomes_dynamic():
    """Tokens of very different size: one scale for all of them leaves the small ones nothing."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = stack(10)

        def forward(self, x):
            x = x[:, :32] * 10 ** x[:, 32:]
            y = self.layers[0](x)
            return self.layers[1:](y / y.norm(dim=-1, keepdim=True))

    x = torch.cat([random(64, 32), torch.linspace(-4, 4, 64)[:, None]], 1)
    compressed = tersor.compress(Scaled().eval(), Recipe.of("int8/min-max:int8-static", keep_float="auto"), Toy((x,)))
    assert compressed.kept_float[0].kept == {"layers.0": "gptq:int8/int8-dynamic"}
    assert compressed.model.layers[0].input_quantizer.format == "int8-dynamic"
    assert compressed.model.layers[1].input_quantizer.format == "int8-static"


def test_the_prediction_follows_the_measurement():
    """Inputs' errors count, which the weights' curvature alone does not see."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(8))).eval()
    with torch.no_grad():
        for index in range(8):
            model[index][0].weight *= 0.4 + index / 4
    choice = made(model, "int8/int4-static", 1).kept_float[0]
    order = [each.site for each in sorted(choice.sites, key=lambda each: each.predicted, reverse=True)]
    places = [order.index(each.site) for each in choice.sites]
    agreement = torch.corrcoef(torch.tensor([places, list(range(8))], dtype=torch.float32))[0, 1]
    assert agreement > 0.7


def test_a_prediction_leaves_the_model_as_it_is():
    model = spoiled()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predictor = LossPredictor(model, WeightsStep(scheme="gptq:int4", exclude=["1"]), Calibration(task()))
    predictor.run()
    assert [type(module) for module in model] == [nn.Linear] * 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [site.name for site in predictor.packed] == list("023456789")
    assert max(predictor.predicted, key=predictor.predicted.get) == "4"


def test_a_linear_models_loss_is_predicted_exactly():
    """One layer, outputs in squares: the curvature is the identity, and the formula the loss itself."""
    model = nn.Sequential(nn.Linear(16, 8))
    site, x = find_sites(model)[0], random(64, 16)
    weight, int4 = site.matrix(model), format_named("int4")
    encoded = int4.encode(weight, int4.fit(weight))
    curvature = torch.full((8,), (x.square().sum(1).mean() / 16).item())
    found = predicted_loss(weight, encoded, None, Stats(row_weight=curvature, sample=x))
    error = x @ (encoded.decode() - weight).t()
    assert found == pytest.approx(0.5 * error.square().sum(1).mean().item(), rel=1e-5)


def test_without_data_there_is_nothing_to_measure():
    with pytest.raises(InputError, match=r"keep_float: auto measures .* give a task"):
        tersor.compress(stack(), Recipe.of("int4", keep_float="auto"))


def test_more_than_there_are_is_refused():
    with pytest.raises(InputError, match="keep_float: 11 of 10 sites"):
        made(stack(), "int4", 11)


@pytest.mark.parametrize("bad", ["some", -1, 2.5, True])
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError, match="keep_float"):
        WeightsStep(scheme="int4", keep_float=bad)


def test_a_bad_site_does_not_spoil_what_is_known_of_those_behind_it():
    """Static ranges are those of the float model, not of one whose earlier layers are broken."""
    choice = made(spoiled(2), "nearest:int4/min-max:int8-static", "auto").kept_float[0]
    assert list(choice.kept) == ["2"]
    alone = {each.site: each.measured for each in choice.sites}
    assert max(loss for site, loss in alone.items() if site != "2") < 0.1 * alone["2"]
