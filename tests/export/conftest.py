"""A small Llama with a byte-level tokenizer, compressed by any recipe."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from exported import byte_level
from tokenizers import pre_tokenizers
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersor
from zoo import pretrained

Artifact = Callable[..., Path]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": 352, "intermediate_size": 256, "initializer_range": 0.1, **HEADS}


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


@pytest.fixture(autouse=True, scope="session")
def one_registry():
    """PyTorch's table of ONNX functions, which it makes anew for every file: that takes as long as a small file."""
    make = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**options: int) -> ONNXRegistry:
        registry = copy.copy(make(**options))
        registry.functions = {name: [*functions] for name, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A bfloat16 Llama with grouped queries and a tied head; its tokenizer fills only a part of its vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128, **SIZES}
    build = pretrained("LlamaForCausalLM", tie_word_embeddings=True, dtype="bfloat16", **sizes)
    build().bfloat16().save_pretrained(folder)
    byte_level(pre_tokenizers.Digits(individual_digits=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifact(llama, tmp_path_factory) -> Artifact:
    """The artifact that a recipe makes of it: `artifact("int4-g32", {"*.down_proj": "int8"})`. Head and embedding are
    left as they are unless a rule names them."""

    @cache
    def made(scheme: str, rules: tuple[tuple[str, str], ...]) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(llama).eval()
        recipe = tersor.Recipe.of(scheme, {"model.embed_tokens": "keep", **dict(rules)})
        folder = tmp_path_factory.mktemp("artifact")
        tersor.save(tersor.compress(model, recipe).model, folder, source=llama)
        return folder

    return lambda scheme, rules={}: made(scheme, tuple(rules.items()))


@pytest.fixture(scope="session")
def ggml_formats(llama, tmp_path_factory) -> Path:
    """The artifact of a wider Llama that holds every K-quant and MXFP4."""
    torch.manual_seed(0)
    model = pretrained("LlamaForCausalLM", hidden_size=256, num_hidden_layers=1, **SIZES)().eval()
    formats = {"q": "q6_k", "k": "q5_k", "v": "q4_k", "o": "q3_k", "up": "q2_k", "down": "mxfp4"}
    rules = {f"*.{name}_proj": format for name, format in formats.items()}
    recipe = tersor.Recipe.of("q4_k", {"model.embed_tokens": "q6_k", **rules})
    folder = tmp_path_factory.mktemp("artifact")
    tersor.save(tersor.compress(model, recipe).model, folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder
