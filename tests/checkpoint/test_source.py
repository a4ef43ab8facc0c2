"""Opening a model: what works, and what every mistake is told."""

import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tersor.checkpoint.open import open_model
from tersor.core import weights_file as weights
from tersor.core.errors import InputError, ModelError
from zoo import PRETRAINED, original

MY_MODELS = """
import torch
def make(): return torch.nn.Sequential(torch.nn.Linear(4, 3))
def wrong(): return 3
def needs(size): return make()
number = 5
layer = torch.nn.Linear(4, 3)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    original("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's own module, importable from the working folder."""
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    (tmp_path / "broken_models.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_models"
    for name in ("my_models", "broken_models"):
        sys.modules.pop(name, None)


def test_opens_a_folder(folder):
    source = open_model(str(folder))
    assert (source.kind, source.architecture, source.notes) == ("transformers", "LlamaForCausalLM", ())
    assert source.num_bytes == (folder / "model.safetensors").stat().st_size
    assert not source.model.training
    ours, theirs = (PRETRAINED["llama"].run(model)[0] for model in (source.model, original("llama")))
    assert torch.equal(ours, theirs)


def test_opens_sharded_weights(tmp_path):
    original("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    source = open_model(str(tmp_path))
    assert len(source.hashes) > 1
    assert torch.equal(PRETRAINED["llama"].run(source.model)[0], PRETRAINED["llama"].run(original("llama"))[0])


def test_missing_weights_are_told(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "the checkpoint lacks model.norm.weight: randomly initialized" in open_model(str(folder)).notes[0]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "model.bin"])
def test_a_missing_path(name):
    with pytest.raises(ModelError, match="no such file or folder"):
        open_model(name)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(ModelError, match=r"a file, not a model; give its folder, or 'package\.module:factory'"):
        open_model(str(folder / "model.safetensors"))


def test_only_the_weights_of_a_folder_are_opened(folder, monkeypatch):
    """`training_args.bin` and the like are no weights, and a lone file is no model."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    (folder / "model.safetensors").unlink()
    for name in ("training_args.bin", "optimizer.pt", "model.ckpt"):
        (folder / name).write_bytes(b"\x80")
        with pytest.raises(ModelError, match=r"no \*\.safetensors file in the folder and no pytorch_model\.bin"):
            open_model(str(folder))
        with pytest.raises(ModelError, match="a file, not a model"):
            open_model(str(folder / name))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json, so not a Hugging Face model folder"):
        open_model(str(tmp_path))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file in the folder"):
        open_model(str(folder))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        open_model(str(folder))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(folder, bad):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, :2] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 2 of 1536 values are NaN"):
        open_model(str(folder))


def test_weights_are_checked_one_at_a_time(tmp_path, monkeypatch):
    """Each is gone before the next is read, and with it the mapping of the file."""
    save_file({f"w{i}": torch.ones(4, 3) for i in range(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    check, seen = weights.check_numbers, []

    def note(tensors, place):
        assert all(tensor() is None for _, tensor in seen)
        seen.extend((name, weakref.ref(tensor)) for name, tensor in tensors.items())
        return check(tensors, place)

    monkeypatch.setattr(weights, "check_numbers", note)
    weights.check_file(tmp_path / "model.safetensors")
    assert [name for name, _ in seen] == ["w0", "w1", "w2"]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"3", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_garbled_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -4},
        {"hidden_size": 10**9},
        {"num_attention_heads": 0},
        {"hidden_act": "no such"},
        {"model_type": "no such"},
        {"model_type": ["llama"]},
        {"architectures": [5]},
        {"dtype": "no such"},
    ],
)
def test_a_config_that_makes_no_sense(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(ModelError):
        open_model(str(folder))


def test_a_quantized_model_is_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="already quantized"):
        open_model(str(folder))


def test_weights_of_another_shape(folder):
    change_config(folder, intermediate_size=64)
    with pytest.raises(ModelError, match="transformers cannot load it as LlamaForCausalLM"):
        open_model(str(folder))


def test_weights_go_with_factories(folder):
    with pytest.raises(InputError, match=r"--weights goes with a model given as 'package\.module:factory'"):
        open_model(str(folder), weights=folder / "model.safetensors")


# `package.module:factory`.


def test_opens_a_factory_with_weights(module, tmp_path):
    state = {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
    save_file(state, tmp_path / "weights.safetensors")
    source = open_model(f"{module}:make", weights=tmp_path / "weights.safetensors")
    assert torch.equal(source.model(torch.ones(4)), torch.full((3,), 4.0))
    assert (source.kind, source.notes) == ("custom", ())
    assert open_model(f"{module}:make").notes == ("no --weights given: the factory's own weights are used",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:make", "No module named 'no_such_package'"),
        ("my_models:maek", "has no attribute 'maek'"),
        ("my_models:", "has no attribute ''"),
        (":make", "Empty module name"),
        (".my_models:make", "package"),
        ("broken_models:make", "invalid syntax"),
        ("my_models:number", "is int, not a function"),
        ("my_models:needs", "missing a required argument: 'size'"),
        ("my_models:layer", "is Linear, not a function"),
        ("my_models:wrong", "returned int, not a torch.nn.Module"),
    ],
)
def test_mistakes_in_a_factory(module, name, message):
    with pytest.raises(InputError, match=message):
        open_model(name)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.weight": torch.ones(3, 5), "0.bias": torch.zeros(3)}, "size mismatch for 0.weight"),
        ({"0.weight": torch.ones(3, 4)}, "Missing key"),
        ({"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3), "1.bias": torch.zeros(3)}, "Unexpected key"),
        ({"0.weight": torch.full((3, 4), torch.nan), "0.bias": torch.zeros(3)}, "0.weight: 12 of 12 values are NaN"),
    ],
)
def test_a_state_dict_that_does_not_fit(module, tmp_path, state, message):
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=message):
        open_model(f"{module}:make", weights=tmp_path / "weights.safetensors")


def test_weights_that_cannot_be_read(module, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        open_model(f"{module}:make", weights=tmp_path / "none.safetensors")
    (tmp_path / "weights.pt").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"weights\.pt: not a whole file of torch\.save"):
        open_model(f"{module}:make", weights=tmp_path / "weights.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_opens_in_the_type_asked_for(dtype, folder, module):
    for name in (str(folder), f"{module}:make"):
        model = open_model(name, dtype=dtype).model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_weights_beyond_the_type_asked_for_are_refused(module, tmp_path):
    save_file({"0.weight": torch.full((3, 4), 1e5), "0.bias": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight holds weights beyond float16; open it with --dtype bfloat16"):
        open_model(f"{module}:make", weights=tmp_path / "weights.safetensors", dtype=torch.float16)
