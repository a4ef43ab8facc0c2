"""compress(): the original stays as it was, and steps follow one another."""

import copy

import pytest
import torch
from torch import nn

import tersor
from laws import random, same_bits
from tersor.core.errors import DataError
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.steps import step_visitor
from test_walk import Toy, assert_same_state, stack, state
from zoo import ZOO


def task_for(case, model):
    return Toy(case.arguments(model))


def steps(*schemes, **rules):
    return Recipe.validated({"steps": [{"scheme": scheme, **rules} for scheme in schemes]}, "the test")


@pytest.mark.parametrize(
    "scheme", ["gptq:int4-g32", "sparsegpt:bitmask", "autoround(num_steps=3):int3-g32", "wanda:bitmask"]
)
@pytest.mark.parametrize("name", ["llama", "linear", "lstm"])
def test_the_original_is_untouched(name, scheme):
    case = ZOO[name]
    model = case.model().train()
    before, output = state(model), [out.clone() for out in case.run(model.eval())]
    model.train()
    compressed = tersor.compress(model, Recipe.of(scheme), task_for(case, model)).model
    assert_same_state(state(model), before)
    assert all(same_bits(a, b) for a, b in zip(case.run(model.eval()), output, strict=True))
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in compressed.parameters()}


@pytest.mark.parametrize("schemes", [("gptq:int8", "gptq:int4-g32"), ("sparsegpt:bitmask", "gptq:int4-g32")], ids=str)
@pytest.mark.parametrize("name", ["llama", "tied head", "conv2d"])
def test_two_weights_steps_follow_one_another(name, schemes):
    """The second step starts from what the first made."""
    case = ZOO[name]
    model = case.model()
    task = task_for(case, model)
    both = tersor.compress(model, steps(*schemes), task)
    first = tersor.compress(model, steps(schemes[0]), task)
    second = tersor.compress(first.model, steps(schemes[1]), task)
    for a, b in zip(case.run(both.model), case.run(second.model), strict=True):
        torch.testing.assert_close(a, b)
    assert {report.scheme for report in both.sites} == {schemes[1]}


def test_steps_may_share_the_sites():
    case = ZOO["llama"]
    model = case.model()
    recipe = Recipe.validated(
        {
            "steps": [
                {"scheme": "keep", "rules": {"*.mlp.*": "gptq:int4-g32"}},
                {"scheme": "keep", "rules": {"*.self_attn.*": "gptq:int8"}},
            ]
        },
        "the test",
    )
    compressed = tersor.compress(model, recipe, task_for(case, model))
    assert {report.scheme for report in compressed.sites} == {"gptq:int4-g32", "gptq:int8"}
    assert len(compressed.sites) == 14


def test_a_transform_and_then_weights():
    case = ZOO["llama"]
    model = case.model()
    before = state(model)
    recipe = Recipe.of("gptq:int8", transforms=["smooth(alpha=0.5)"])
    compressed = tersor.compress(model, recipe, task_for(case, model)).model
    assert_same_state(state(model), before)
    with torch.no_grad():
        gap = (case.run(compressed)[0] - case.run(model)[0]).norm() / case.run(model)[0].norm()
    assert gap < 0.05


def test_gptq_with_data_beats_gptq_without():
    torch.manual_seed(0)
    model = stack("plain")
    x = random(64, 4, 8) @ random(8, 8, seed=1)

    def error(task):
        small = tersor.compress(model, Recipe.of("gptq:int3"), task).model
        with torch.no_grad():
            return (small(x) - model(x)).square().mean().item()

    assert error(Toy((x,))) < 0.8 * error(None)


def test_autoround_tunes_whole_blocks():
    """Where that helps, and the report tells of the weights that were chosen."""
    model = stack("plain")
    x = random(64, 4, 8)
    results = {
        name: tersor.compress(model, Recipe.of(f"{name}:int2"), Toy((x,)))
        for name in ("gptq(num_rounds=0)", "autoround(num_steps=80, num_rounds=0)")
    }
    with torch.no_grad():
        wanted = model.layers[0](x)
        errors = [(result.model.layers[0](x) - wanted).square().mean().item() for result in results.values()]
    assert errors[1] <= errors[0]
    tuned = results["autoround(num_steps=80, num_rounds=0)"]
    started = results["gptq(num_rounds=0)"].model
    assert any(not torch.equal(s.matrix(started), s.matrix(tuned.model)) for s in find_sites(started))
    for site, report in zip(find_sites(tuned.model), tuned.sites, strict=True):
        weight = site.matrix(model)
        error = ((site.matrix(tuned.model) - weight).norm() / weight.norm()).item()
        assert report.relative_error == pytest.approx(error, rel=1e-3)


def test_statistics_that_are_not_numbers_name_the_site_and_a_way_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = random(3, 4)
    x[1, 2] = float("nan")
    with pytest.raises(DataError, match=r"0: the second moment of .* is not finite.*; use other data, .*--exclude '0'"):
        tersor.compress(model, Recipe.of("gptq:int4"), Toy((x,)))


@pytest.mark.parametrize(
    ("scheme", "name", "read"),
    [
        ("mse:int8", "linear", True),
        ("svd:lowrank", "linear", True),
        ("gptq:int4", "linear", False),
        ("wanda:bitmask", "linear", False),  # the inputs are known, and it goes by them
        ("wanda:bitmask", "lstm", True),
    ],
)
def test_the_curvature_is_gathered_only_where_it_is_read(scheme, name, read, monkeypatch):
    """It costs a backward pass over all the data."""
    calls = []
    monkeypatch.setattr(step_visitor, "estimate_fisher", lambda *args, **options: calls.append(args) or {})
    model = ZOO[name].model()
    tersor.compress(model, Recipe.of(scheme), task_for(ZOO[name], model))
    assert bool(calls) == read


def test_a_model_on_its_way_is_left_as_it_was_when_compression_fails(monkeypatch):
    model = ZOO["llama"].model()
    before = state(model)

    def fail(*args):
        raise ArithmeticError("no more")

    monkeypatch.setattr(step_visitor, "compress_site", fail)
    with pytest.raises(ArithmeticError):
        tersor.compress(model, Recipe.of("gptq:int4"), task_for(ZOO["llama"], model))
    assert_same_state(state(model), before)
    assert copy.deepcopy(model) is not model
