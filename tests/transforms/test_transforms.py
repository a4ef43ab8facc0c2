"""The law of transforms, run over the table: the model computes what it did, and keeps the tensors it had."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, in_float64, measured, model_of

import tersor.transforms
from tersor.core.errors import ModelError
from tersor.methods.stats import Stats
from tersor.nn.copies import copy_but_sites
from tersor.transforms import TRANSFORMS
from tersor.transforms.fold_bn import FoldBn

DECODERS = {"llama", "llama tied", "llama with biases", "mistral", "qwen2", "qwen3", "smollm3", "gemma"}
PAIRED = {*DECODERS, "mixtral", "phi3", "gemma2", "gemma3", "gpt2", "opt", "opt, norms last"}
PAIRED |= {"bert", "roberta", "distilbert"}
KNOWN = {
    "fold-bn": {"resnet", "mobilenet", "mobilenet, relu6", "dense"},
    "equalize": {"plain", "dense"},
    "smooth": PAIRED,
    "awq": PAIRED,
    "hadamard": DECODERS - {"llama tied"},
    "hadamard-heads": PAIRED - {"phi3"},
}


@pytest.fixture
def float64(monkeypatch):
    """Softmax in the type it is given, for attention that asks for float32."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim))


def tensors(model):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def check_law(transform, model, name):
    stats, copy = measured(model, name), copy_but_sites(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    transform.apply(copy, stats)
    assert tensors(copy) == tensors(model), "an artifact would not load into the model"
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items()), "wrote to the original"
    assert any(not torch.equal(before[key], tensor) for key, tensor in copy.state_dict().items()), "changed nothing"
    for was, now in zip(MODELS[name].run(in_float64(model)), MODELS[name].run(in_float64(copy)), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9)


# Built of the same modules as one of the others.
SIBLINGS = {"mistral", "qwen2", "smollm3", "roberta", "distilbert"}


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        pytest.param(transform, name, marks=pytest.mark.slow if name in SIBLINGS else ())
        for transform in TRANSFORMS
        for name in MODELS
        if name in KNOWN[transform]
    ],
)
def test_the_function_is_unchanged(transform, name, float64):
    check_law(TRANSFORMS[transform](), model_of(name), name)


@pytest.mark.parametrize(("transform", "name"), [(t, m) for t in TRANSFORMS for m in MODELS if m not in KNOWN[t]])
def test_other_models_are_refused(transform, name):
    model = model_of(name)
    with pytest.raises(ModelError, match=transform):
        TRANSFORMS[transform]().apply(model, {})


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "dense"])
def test_equalizing_what_was_folded(name):
    model = model_of(name)
    FoldBn().apply(model, measured(model, name))
    check_law(TRANSFORMS["equalize"](), model, name)


@pytest.mark.parametrize("transform", ["smooth", "awq"])
def test_without_data_nothing_is_changed(transform):
    model = model_of("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    TRANSFORMS[transform]().apply(model, {})
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_the_table_is_whole():
    """Every file that opens with a paper is a row, and reads statistics that exist; corrections of a bias are not."""
    folder = Path(tersor.transforms.__file__).parent
    papers = {f.stem for f in folder.glob("*.py") if "http" in (ast.get_docstring(ast.parse(f.read_text())) or "")}
    assert {t.__module__.rpartition(".")[2] for t in TRANSFORMS.values()} == papers - {"bias_correction"}
    assert all(t.needs <= {field.name for field in fields(Stats)} for t in TRANSFORMS.values())
    assert all(t().name == name for name, t in TRANSFORMS.items())
