"""`--dtype` says what a model computes in, for every verb that opens one."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import cli_runner
import tersor
from tersor.core.errors import InputError, ModelError
from zoo import ZOO

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
"""


@pytest.fixture
def inside(tmp_path, monkeypatch):
    (tmp_path / "dtype_model.py").write_text(MODEL)
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    np.savez(tmp_path / "points.npz", x=x, y=(x[:, 0] > 0) * 1, x_train=x, y_train=(x[:, 0] > 0) * 1)
    np.savez(tmp_path / "ids.npz", x=np.random.default_rng(0).integers(0, 20, (40, 6)))
    ZOO["llama"].model().save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("dtype_model", None)


def float_types(path):
    return {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stream_computes_in_it(inside, dtype, capsys):
    config = LlamaConfig(**SIZES, num_hidden_layers=3)
    LlamaForCausalLM(config).save_pretrained("llama")
    flags = ["--format", "nearest:int8-g32", "--data", "ids.npz", "--dtype", dtype, "--json"]
    done = cli_runner.tersor(capsys, "compress", "llama", "-o", "small", "--stream", *flags)
    assert done.status == 0, done.stderr
    loaded = tersor.load("small")
    assert loaded.model.norm.weight.dtype == loaded.dtype == getattr(torch, dtype)
    assert {entry["dtype"] for entry in done.json["sites"].values()} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_student_is_written_in_it(inside, dtype, capsys):
    done = cli_runner.tersor(capsys, "student", "llama", "--layers", 1, "-o", "cut", "--dtype", dtype)
    assert done.status == 0, done.stderr
    assert float_types("cut/model.safetensors") == {getattr(torch, dtype)}


@pytest.mark.parametrize("verb", ["bench", "explain"])
def test_bench_and_explain_run_in_it(inside, verb, capsys):
    flags = ["--seconds", 0.05, "--batch", 1, "--dtype", "bfloat16", "--json"]
    flags += ["--no-memory"] if verb == "bench" else []
    done = cli_runner.tersor(capsys, verb, "dtype_model:make", *flags)
    assert done.status == 0, done.stderr
    if verb == "bench":
        assert done.json["timings"][0]["candidate"]["dtype"] == "bfloat16"
    (inside / "net.onnx").write_bytes(b"")
    refused = cli_runner.tersor(capsys, verb, "net.onnx", *flags)
    assert refused.status == 2
    assert "--dtype goes with models that PyTorch runs" in refused.json["error"]


def test_finetune_computes_in_it_and_writes_what_came(inside, capsys):
    flags = ["--task", "classification", "--data", "points.npz", "--steps", 2, "--dtype", "bfloat16"]
    done = cli_runner.tersor(capsys, "finetune", "dtype_model:make", "-o", "tuned", *flags)
    assert done.status == 0, done.stderr
    assert float_types("tuned/model.safetensors") == {torch.float32}
    old = cli_runner.tersor(capsys, "finetune", "dtype_model:make", "-o", "auto", *flags[:-1], "auto")
    assert old.status == 0, old.stderr


def test_merge_writes_in_it(inside, capsys):
    pytest.importorskip("peft")
    data = ["--task", "fidelity", "--data", "ids.npz"]
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained("adapter")
    done = cli_runner.tersor(capsys, "merge", "llama", "adapter", "-o", "merged", *data, "--dtype", "bfloat16")
    assert done.status == 0, done.stderr
    assert float_types("merged/model.safetensors") == {torch.bfloat16}


def test_export_computes_in_it(inside, capsys):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    for dtype, kind in (("float16", 10), ("float32", 1), ("fp16", 10)):
        command = ["export", "dtype_model:make", "--to", "onnx", "-o", "net.onnx", "--shape", "8", "--overwrite"]
        done = cli_runner.tersor(capsys, *command, "--dtype", dtype)
        assert done.status == 0, done.stderr
        assert {each.data_type for each in onnx.load("net.onnx").graph.initializer if each.dims} >= {kind}
    refused = cli_runner.tersor(capsys, *command, "--dtype", "bfloat16")
    assert "--dtype bf16 is not one of fp32, fp16" in refused.stderr
    tersor.save(tersor.compress(ZOO["llama"].model(), tersor.Recipe.of("keep", {"*.q_proj": "int8"})).model, "small")
    made = tersor.export("small", "packed", to="compressed-tensors", dtype="float16")
    assert float_types(made.output / "model.safetensors") == {torch.float16}


def test_a_weight_beyond_the_type_is_named(inside):
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(1e6)
    with pytest.raises(ModelError, match="holds weights beyond float16"):
        tersor.inspect(model, dtype="float16")
    with pytest.raises(InputError, match="unknown --dtype 'int8'"):
        tersor.inspect(model, dtype=torch.int8)
