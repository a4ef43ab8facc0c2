"""Artifacts: what is loaded is what was saved, bit for bit, in the size that was foretold."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

import tersor
from tersor.checkpoint.artifact import MANIFEST, WEIGHTS
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.notice import NO_WEIGHTS, without
from tersor.checkpoint.open import open_model
from tersor.checkpoint.source import state_hash
from tersor.core.errors import ArtifactError
from tersor.core.weights_file import DTYPE_NAMES, METADATA, file_size, read_weights, write_weights
from tersor.nn.packed import PackedWeight
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from zoo import PLAIN, PRETRAINED, ZOO, TiedHead, decoded, original, with_schemes

SCHEMES = ["int8-dynamic", "nearest:int3-asym", "bitmask", "keep"]


@cache
def packed(name: str, scheme: str) -> nn.Module:
    return tersor.compress(original(name), Recipe.of(scheme)).model


def fresh(name: str) -> nn.Module | None:
    """What `load` is given: another instance of a custom model, nothing for a pretrained one."""
    torch.manual_seed(99)
    return ZOO[name].build() if name in PLAIN else None


def saved(model: nn.Module, folder: Path) -> Path:
    tersor.save(model, folder)
    return folder


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "scheme"), with_schemes(SCHEMES))
def test_loads_what_was_saved_in_the_size_foretold(name, scheme, tmp_path):
    case, small = ZOO[name], packed(name, scheme)
    loaded = tersor.load(saved(small, tmp_path), model=fresh(name))
    assert type(loaded) is type(small)
    assert not loaded.training
    assert equal(case.run(loaded), case.run(small))
    assert find_sites(loaded) == find_sites(small)
    assert size_of(small) == size_of(loaded) == (tmp_path / WEIGHTS).stat().st_size
    assert state_hash(loaded) == state_hash(small)


@pytest.mark.parametrize("name", ZOO)
def test_saving_twice_writes_the_same_bytes(name, tmp_path):
    small = packed(name, "nearest:int3-asym")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    saved(small, folders[0])
    saved(tersor.load(folders[0], model=fresh(name)), folders[1])
    assert (folders[0] / WEIGHTS).read_bytes() == (folders[1] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ZOO)
def test_unpacked_gives_ordinary_parameters_with_the_decoded_values(name, tmp_path):
    case, small = ZOO[name], packed(name, "nearest:int3-asym")
    loaded = tersor.load(saved(small, tmp_path), model=fresh(name), packed=False)
    assert not any(isinstance(module, PackedWeight) for module in loaded.modules())
    assert dict(loaded.named_parameters()).keys() == dict(original(name).named_parameters()).keys()
    assert find_sites(loaded) == find_sites(original(name))
    assert equal(case.run(loaded.requires_grad_(False)), case.run(decoded(original(name), small)))


NEW_PROCESS = """
import sys, torch, tersor
model = tersor.load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected), "other outputs"
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), torch.load(sys.argv[3]))
print("same")
"""


def test_a_new_process_computes_the_same(tmp_path):
    case, small = PRETRAINED["llama"], packed("llama", "int8-dynamic")
    (tmp_path / "small").mkdir()
    saved(small, tmp_path / "small")
    torch.save((case.arguments(small), case.run(small)[0]), tmp_path / "io.pt")
    torch.save(case.generate(small), tmp_path / "tokens.pt")
    arguments = [tmp_path / "small", tmp_path / "io.pt", tmp_path / "tokens.pt"]
    done = subprocess.run([sys.executable, "-c", NEW_PROCESS, *arguments], capture_output=True, text=True, timeout=900)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize(
    ("name", "gone"),
    [("tied head", "head.weight"), ("llama", "lm_head.weight"), ("t5", "lm_head.weight"), ("gpt2", "lm_head.weight")],
)
@pytest.mark.parametrize("scheme", ["keep", "nearest:int4"])
@pytest.mark.parametrize("packed_again", [True, False])
def test_tied_weights_are_stored_once_and_stay_tied(name, gone, scheme, packed_again, tmp_path):
    small = packed(name, scheme)
    loaded = tersor.load(saved(small, tmp_path), model=fresh(name), packed=packed_again)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert not any(key.startswith(gone) for key in file.keys())  # noqa: SIM118
    tied = [site for site in find_sites(loaded) if len(site.owners) > 1]
    assert tied == [site for site in find_sites(small) if len(site.owners) > 1]
    assert len(tied) == 1


@pytest.mark.parametrize("name", ["linear", "lstm", "encoder", "tied head", "llama", "mixtral", "clip vision"])
@pytest.mark.parametrize("scheme", ["nearest:int4", "keep"])
def test_bfloat16_models_come_back_in_bfloat16(name, scheme, tmp_path):
    case = ZOO[name]
    torch.manual_seed(1)
    model = case.build().eval()
    if name in PRETRAINED:  # as from_pretrained(dtype=torch.bfloat16) would: rotary buffers stay in float32
        model.save_pretrained(tmp_path / "original")
        model = type(model).from_pretrained(tmp_path / "original", dtype=torch.bfloat16).eval()
    else:
        model = model.to(torch.bfloat16)
    small = tersor.compress(model, Recipe.of(scheme)).model
    (tmp_path / "small").mkdir()
    loaded = tersor.load(saved(small, tmp_path / "small"), model=fresh(name))
    assert {site.dtype for site in find_sites(loaded)} == {torch.bfloat16}
    assert {name: b.dtype for name, b in loaded.named_buffers()} == {name: b.dtype for name, b in small.named_buffers()}
    assert equal(case.run(loaded), case.run(small))
    assert size_of(small) == (tmp_path / "small" / WEIGHTS).stat().st_size


def test_side_files_come_along_and_weights_and_code_do_not(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    original("llama").save_pretrained(source)
    for name in ("tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "code.py", ".hidden", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    output.mkdir()
    tersor.save(packed("llama", "nearest:int4"), output, source=source)
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    kept = {"config.json", "generation_config.json", "tokenizer.json", "1_Pooling/config.json"}
    assert names == kept | {WEIGHTS, NO_WEIGHTS, MANIFEST}
    assert without(json.loads((output / "config.json").read_text())) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("from_source", [True, False])
def test_the_generation_config_is_kept(from_source, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    torch.manual_seed(0)
    model = PRETRAINED["llama"].build()
    model.generation_config = GenerationConfig(max_new_tokens=3, repetition_penalty=1.5, eos_token_id=[2, 5])
    model.save_pretrained(source)
    output.mkdir()
    small = tersor.compress(model, Recipe.of("nearest:int4")).model
    tersor.save(small, output, source=source if from_source else None)
    loaded = tersor.load(output)
    assert loaded.generation_config.repetition_penalty == 1.5
    assert loaded.generation_config.eos_token_id == [2, 5]
    prompt = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded.generate(prompt, do_sample=False), small.eval().generate(prompt, do_sample=False))


def test_an_artifact_opens_as_a_model(tmp_path):
    small = packed("llama", "nearest:int4")
    source = open_model(str(saved(small, tmp_path)))
    assert (source.kind, source.architecture) == ("artifact", "LlamaForCausalLM")
    assert source.num_bytes == size_of(small)
    assert equal(PRETRAINED["llama"].run(source.model), PRETRAINED["llama"].run(small))


def test_an_unpacked_artifact_is_an_ordinary_checkpoint(tmp_path):
    """Decoded and saved by transformers, it loads where tersor is not installed."""
    for name in ("small", "plain"):
        (tmp_path / name).mkdir()
    saved(packed("llama", "nearest:int4"), tmp_path / "small")
    plain = tersor.load(tmp_path / "small", packed=False)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert equal(PRETRAINED["llama"].run(again), PRETRAINED["llama"].run(plain))


def test_a_custom_model_must_be_given(tmp_path):
    saved(packed("tied head", "nearest:int4"), tmp_path)
    with pytest.raises(ArtifactError, match=r"custom model \(TiedHead\); pass a fresh instance: tersor\.load\("):
        tersor.load(tmp_path)


def test_another_custom_model_is_refused(tmp_path):
    saved(packed("tied head", "nearest:int4"), tmp_path)
    with pytest.raises(ArtifactError, match="the manifest names the site embed, which Sequential does not have"):
        tersor.load(tmp_path, model=nn.Sequential(nn.Linear(3, 3)))
    wider = TiedHead()
    wider.mix = nn.Linear(12, 13)
    with pytest.raises(ArtifactError, match=r"mix: stored as \(12, 12\), but the model has \(13, 12\) here"):
        tersor.load(tmp_path, model=wider)
    longer = TiedHead()
    longer.norm = nn.LayerNorm(4)
    with pytest.raises(ArtifactError, match=r"lacks norm\.bias"):
        tersor.load(tmp_path, model=longer)


def test_more_manifest_keys_are_kept(tmp_path):
    tersor.save(packed("linear", "nearest:int4"), tmp_path, manifest={"seed": 3})
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["seed"] == 3
    assert manifest["sites"]["0"] == {
        "format": "int4",
        "shape": [7, 10],
        "dtype": "float32",
        "view": "rows",
        "weight_shape": [7, 10],
        "activation": None,
    }


def test_weights_that_share_memory_are_written_apart(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data = model[0].weight.data
    model[2].weight.data = model[0].weight.data[:2]
    loaded = tersor.load(saved(model, tmp_path), model=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert size_of(model) == (tmp_path / WEIGHTS).stat().st_size


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_has_the_size_foretold(dtype, tmp_path):
    """Together with every other one, so that their order in the file matters."""
    for length in (1, 9, 10, 999, 1000):
        tensors = {f"n{i}": torch.zeros(3, 1).to(other) for i, other in enumerate(DTYPE_NAMES)}
        tensors['odd "name"\n\u00e9'] = torch.zeros(length).to(dtype)
        write_weights(tensors, tmp_path / "file.safetensors")
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        assert file_size(layout, METADATA) == (tmp_path / "file.safetensors").stat().st_size
        assert read_weights(tmp_path / "file.safetensors")["n0"].dtype == next(iter(DTYPE_NAMES))


def test_the_empty_file_has_the_size_foretold(tmp_path):
    write_weights({}, tmp_path / "file.safetensors")
    assert file_size([], METADATA) == (tmp_path / "file.safetensors").stat().st_size


def test_what_can_be_aligned_in_a_file_is(tmp_path):
    """Safetensors leaves no room between tensors: those of a multiple of 64 bytes come first."""
    for length in range(1, 70, 7):
        tensors = {
            "a" * length: torch.randint(-99, 99, (16, 12), dtype=torch.int8),
            "b": torch.randn(3),
            "c": torch.randn(5, 32).bfloat16(),
            "d": torch.randn(7).half(),
            "e": torch.ones(1, dtype=torch.int8),
        }
        write_weights(tensors, tmp_path / "file.safetensors")
        read = read_weights(tmp_path / "file.safetensors")
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        assert all(read[name].data_ptr() % 64 == 0 for name in ("a" * length, "c"))
        assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in read.values())


def test_a_type_that_no_file_holds_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"a is torch\.complex128, which tersor does not store"):
        write_weights({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "file.safetensors")
    assert not (tmp_path / "file.safetensors").exists()
