"""What would fail after a training is refused before it: a step looks at what those before it will have made."""

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import DataError, FormatError, InputError, TersorError
from tersor.pipeline import check_steps
from tersor.recipe import Recipe
from tersor.schemes.scheme import Scheme
from tersor.steps.preview import Preview, Pruning, fills_zeros
from tersor.training.masks import N_OF_M, MaskChoice, Masks

PRUNE = {"step": "prune", "sparsity": 0.5}
HALF = Pruning(0.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def recipe(*steps):
    return Recipe.validated({"steps": list(steps)}, "here")


@pytest.mark.parametrize(
    "scheme",
    ["gptq:int4-g64", "gptq:int8", "autoround:int4-g64", "sparsegpt:bitmask", "svd:lowrank", "lqer:int4-g64+lowrank"],
)
@pytest.mark.parametrize("first", [PRUNE, {"step": "lottery"}], ids=["prune", "lottery"])
def test_a_method_that_fills_zeros_is_refused_at_once(model, scheme, first):
    with pytest.raises(FormatError, match=r"0: .* fills weights that an earlier step pruned; .*--exclude '0'"):
        check_steps(recipe(first, {"scheme": scheme}), model, is_whole=False)
    check_steps(recipe(first, {"scheme": scheme, "exclude": ["*"]}), model, is_whole=False)
    check_steps(recipe({**first, "exclude": ["0"]}, {"rules": {"0": scheme}}), model, is_whole=False)
    check_steps(recipe({"scheme": scheme}), model, is_whole=False)


@pytest.mark.parametrize(
    "scheme", ["int4-g64", "mse:int8", "nearest:int4-g64", "zero-mask:bitmask", "nf4", "nearest:bf16"]
)
def test_what_keeps_zeros_is_let_through(model, scheme):
    check_steps(recipe(PRUNE, {"scheme": scheme}), model, is_whole=False)


def test_a_method_without_data_fills_nothing(model):
    assert fills_zeros(Scheme.parse("gptq:int4"), HALF, 64, True)
    assert not fills_zeros(Scheme.parse("gptq:int4"), HALF, 64, False)


def test_the_preview_is_what_pruning_then_does(model):
    choice, masks = MaskChoice(0.5), Masks()
    choice.tighten(model, masks)
    preview = Preview(model)
    choice.check(preview)
    assert preview.pruned.keys() == masks.masks.keys()
    made = tersor.run("mse:int4", model).model
    for site in tersor.find_sites(made):
        assert not site.matrix(made)[~masks.masks[site.name]].any()


def test_a_mask_that_the_format_does_not_have(model):
    with pytest.raises(FormatError, match="0: an earlier step prunes it, and 2:4: the mask keeps more than 2 of 4"):
        check_steps(recipe(PRUNE, {"scheme": "zero-mask:2:4"}), model, is_whole=False)
    check_steps(recipe({"step": "prune", "pattern": "2:4"}, {"scheme": "zero-mask:2:4"}), model, is_whole=False)
    assert N_OF_M["2:4"].choose(torch.rand(1, 4)).sum() == 2


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"scheme": "int8"}, PRUNE], "0 is packed already: prune before the weights step"),
        ([{"scheme": "int8"}, {"step": "qat", "scheme": "int4"}], "0: is packed already, and qat trains float weights"),
        (
            [PRUNE, {"step": "qat", "scheme": "int4-asym"}],
            "0: an earlier step pruned it, and int4-asym has no exact zero",
        ),
        ([{**PRUNE, "exclude": ["*"]}], "nothing to prune: exclude matches every site"),
        ([PRUNE, {"step": "student", "layers": 1}], "step student stands after a step that prunes"),
        ([{"scheme": "int8"}, {"step": "student", "layers": 1}], "step student stands after a weights step"),
        ([{"step": "finetune"}, {"scheme": "int8", "keep_float": 3}], "keep_float: 3 of 2 sites cannot be kept"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_steps_that_do_not_go_together(model, steps, message):
    with pytest.raises(TersorError, match=message):
        check_steps(recipe(*steps), model, is_whole=False)


def test_run_checks_every_step_before_the_first(model):
    """No training happens: the data of a task that has none would be asked for first."""
    with pytest.raises(DataError, match="prune: no task has no train split"):
        tersor.run(recipe(PRUNE), model)
    with pytest.raises(InputError, match="keep_float: auto measures the loss on calibration data"):
        tersor.run(recipe({"scheme": "int8", "keep_float": "auto"}), model)
