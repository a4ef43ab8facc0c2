"""Every way an artifact can be damaged or forged ends in an ArtifactError that says what is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersor
from tersor.checkpoint.artifact import MANIFEST, WEIGHTS
from tersor.core.errors import ArtifactError, TersorError
from tersor.core.files import sha256
from tersor.core.weights_file import METADATA, read_weights, write_weights
from tersor.recipe import Recipe
from zoo import original

FUZZ = settings(
    deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 40), nn.Linear(40, 4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An artifact with an integer site, a sparse site, a site with quantized inputs, and buffers."""
    torch.manual_seed(0)
    rules = {"0": "int4-asym", "2": "bitmask", "3": "int8-dynamic"}
    folder = tmp_path_factory.mktemp("whole")
    tersor.save(tersor.compress(fresh(), Recipe.of("keep", rules)).model, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "artifact")


def load(folder: Path) -> nn.Module:
    return tersor.load(folder, model=fresh())


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def write(folder: Path, manifest: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))


def vouch(folder: Path) -> None:
    """Make the manifest agree with the weights file, as a forger would."""
    manifest = manifest_of(folder)
    file = folder / WEIGHTS
    manifest["files"][WEIGHTS] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    write(folder, manifest)


def edit(folder: Path, change: Any) -> None:
    tensors = read_weights(folder / WEIGHTS)
    change(tensors)
    write_weights(tensors, folder / WEIGHTS)
    vouch(folder)


def test_the_whole_artifact_loads(folder):
    assert load(folder)(torch.ones(2, 16)).shape == (2, 4)
    vouch(folder)
    load(folder)


# The weights file against the formats' layout, with hashes that agree.


@pytest.mark.parametrize("part", ["0.weight.codes", "0.weight.scale", "0.weight.zero_point", "2.weight.mask", "3.bias"])
def test_a_missing_tensor(folder, part):
    edit(folder, lambda tensors: tensors.pop(part))
    with pytest.raises(ArtifactError, match=part.rpartition(".")[2]):
        load(folder)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("0.weight.codes", torch.int8),
        ("0.weight.scale", torch.float32),
        ("0.weight.scale", torch.bfloat16),
        ("0.weight.zero_point", torch.int64),
        ("2.weight.values", torch.float32),
        ("3.weight.codes", torch.uint8),
        ("1.num_batches_tracked", torch.float32),
        ("1.running_mean", torch.int32),
        ("3.bias", torch.int64),
        ("3.bias", torch.complex64),
    ],
)
def test_another_dtype(folder, part, other):
    edit(folder, lambda tensors: tensors.update({part: tensors[part].to(other)}))
    with pytest.raises(ArtifactError, match=str(other)):
        load(folder)


@pytest.mark.parametrize("part", ["0.weight.codes", "0.weight.scale", "2.weight.mask", "2.weight.values", "3.bias"])
@pytest.mark.parametrize(
    "reshape",
    [lambda t: t[:-1], lambda t: t[None], lambda t: t[:0], lambda t: torch.cat([t, t]), lambda t: t.flatten()[0]],
)
def test_another_shape(folder, part, reshape):
    edit(folder, lambda tensors: tensors.update({part: reshape(tensors[part]).contiguous()}))
    with pytest.raises(ArtifactError, match=r"has|bits set|stored as"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["extra", "0.weight", "0.weight.extra", "3.weight.input.scale", "0.weight.input.x", ""]
)
def test_an_extra_tensor(folder, name):
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(ArtifactError, match=r"which the model does not have|has the parameters"):
        load(folder)


def test_a_mask_that_does_not_match_its_values(folder):
    edit(folder, lambda tensors: tensors["2.weight.mask"].bitwise_xor_(1))
    with pytest.raises(ArtifactError, match=r"^2: bitmask: \d+ bits set for \d+ values"):
        load(folder)


# The file as bytes.


def test_a_missing_file(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="missing from the artifact"):
        load(folder)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(ArtifactError, match="missing from the artifact"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file(folder, keep):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"bytes, but .* were written; copy it again"):
        load(folder)
    vouch(folder)
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        load(folder)


@given(data=st.data())
@FUZZ
def test_any_flipped_bit_is_noticed(whole, tmp_path, data):
    folder = shutil.copytree(whole, tmp_path / "artifact", dirs_exist_ok=True)
    content = bytearray((whole / WEIGHTS).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        load(folder)


def only_our_errors(folder: Path) -> None:
    """It loads and runs, or says why not."""
    try:
        load(folder)(torch.ones(2, 16))
    except TersorError as error:
        assert str(error)  # noqa: PT017


@given(data=st.data())
@FUZZ
def test_forged_bytes_load_or_are_refused(whole, tmp_path, data):
    """Bytes changed with a hash that agrees, mostly in the header."""
    folder = shutil.copytree(whole, tmp_path / "artifact", dirs_exist_ok=True)
    content = bytearray((whole / WEIGHTS).read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    (folder / WEIGHTS).write_bytes(content)
    vouch(folder)
    only_our_errors(folder)


dtypes = st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "X", 1])
sides = st.lists(st.integers(0, 2**63) | st.integers(-2, 100), max_size=4)


@given(
    header=st.dictionaries(
        st.sampled_from(["0.weight.codes", "0.weight.scale", "3.bias", "extra", "__metadata__"]),
        st.fixed_dictionaries(
            {"dtype": dtypes, "shape": sides, "data_offsets": st.lists(st.integers(-1, 2**63), min_size=1, max_size=3)}
        ),
        max_size=3,
    )
)
@FUZZ
def test_forged_headers_are_refused(whole, tmp_path, header):
    """Huge shapes and offsets that point nowhere: no crash, and no large allocation."""
    folder = shutil.copytree(whole, tmp_path / "artifact", dirs_exist_ok=True)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    vouch(folder)
    with pytest.raises(ArtifactError):
        load(folder)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [("F4", 2), ("F6_E2M3", 3), ("F8_E4M3", 4), ("F8_E8M0", 4), ("U16", 8), ("C64", 32), ("I64", 32)],
)
def test_dtypes_a_parameter_cannot_have(whole, tmp_path, dtype, width):
    folder = shutil.copytree(whole, tmp_path / "artifact")
    content = (whole / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header["3.bias"] = {"dtype": dtype, "shape": [4], "data_offsets": [len(data), len(data) + width]}
    # The old bias stays, under a new name, so that no byte is without an owner.
    header["old"] = json.loads(content[8 : 8 + size])["3.bias"]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(width))
    vouch(folder)
    with pytest.raises(ArtifactError):
        load(folder)


# The manifest.


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tersor", 2, "written by format version 2; this tersor reads 1"),
        ("tersor", "1", "written by format version 1"),
        ("tersor", None, "written by format version None"),
        ("sites", [], "sites: Input should be an object"),
        ("sites", {"0": 3}, r"sites\.0: Input should be an object"),
        ("sites", {"0": {}}, r"sites\.0\.format: Field required"),
        ("model", {}, r"model\.class: Field required"),
        ("model", {"class": 5}, r"model\.class: Input should be a valid string"),
        ("files", {}, "were written"),
        ("files", {WEIGHTS: 3}, "Input should be an object"),
        ("files", {WEIGHTS: {"bytes": "many", "sha256": ""}}, "bytes: Input should be a valid integer"),
    ],
)
def test_a_manifest_of_the_wrong_kind(folder, key, value, message):
    write(folder, manifest_of(folder) | {key: value})
    with pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "int4-g63", "0: unknown format 'int4-g63': did you mean"),
        ("format", "../../etc/passwd", "0: unknown format"),
        ("format", ["int4"], r"sites\.0\.format"),
        ("format", "int4", "0.weight.zero_point, which the model does not have"),
        ("format", "int8", "part codes should be torch.int8"),
        ("format", "nf4", r"part codes should be|absmax"),
        ("shape", [16, 8], r"0: stored as \(16, 8\), but the model has \(8, 16\) here"),
        ("shape", [10**15, 10**15], "0: stored as"),
        ("shape", [-1, 16], "0: stored as"),
        ("shape", [8], r"sites\.0\.shape"),
        ("shape", [8, 16, 1], r"sites\.0\.shape"),
        ("shape", [8.5, 16], r"sites\.0\.shape\.0"),
        ("shape", "8x16", r"sites\.0\.shape"),
        ("shape", None, r"sites\.0\.shape"),
        ("dtype", "int8", r"sites\.0\.dtype"),
        ("dtype", "nn", r"sites\.0\.dtype"),
        ("activation", "int8-dinamic", "0: unknown activation format 'int8-dinamic': did you mean 'int8-dynamic'"),
        ("activation", 3, r"sites\.0\.activation"),
    ],
)
def test_a_forged_site(folder, field, value, message):
    manifest = manifest_of(folder)
    manifest["sites"]["0"][field] = value
    write(folder, manifest)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["7", "", ".", "0.weight", "../0", "0\x00", "__class__"])
def test_a_site_the_model_does_not_have(folder, name):
    manifest = manifest_of(folder)
    manifest["sites"][name] = manifest["sites"]["0"]
    write(folder, manifest)
    with pytest.raises(ArtifactError, match="which Sequential does not have"):
        load(folder)


def test_a_site_left_out(folder):
    manifest = manifest_of(folder)
    del manifest["sites"]["0"]
    write(folder, manifest)
    with pytest.raises(ArtifactError, match=r"lacks 0\.weight"):
        load(folder)


def test_other_files_in_the_manifest_are_never_opened(folder):
    manifest = manifest_of(folder)
    manifest["files"]["../../../etc/passwd"] = {"sha256": "", "bytes": 1}
    write(folder, manifest)
    load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"tersor": ' + b"9" * 5000 + b"}",
        b'{"tersor": NaN}',
    ],
)
def test_a_garbled_manifest(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST):
        load(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(ArtifactError, match=r"no tersor\.json, so not a tersor artifact"):
        tersor.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"no tersor\.json"):
        tersor.load(tmp_path / "nowhere")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("int4"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), value=json_values)
@FUZZ
def test_any_value_anywhere_in_the_manifest_loads_or_is_refused(whole, tmp_path, data, value):
    folder = shutil.copytree(whole, tmp_path / "artifact", dirs_exist_ok=True)
    manifest = manifest_of(whole)
    inner: Any = manifest
    while isinstance(inner, dict):
        holder, key = inner, data.draw(st.sampled_from(sorted(inner)))
        inner = inner[key] if inner[key] and data.draw(st.booleans() | st.just(True)) else None
    if data.draw(st.booleans()):
        holder[key] = value
    else:
        del holder[key]
    write(folder, manifest)
    only_our_errors(folder)


@given(data=st.data())
@FUZZ
def test_changed_manifest_bytes_load_or_are_refused(whole, tmp_path, data):
    folder = shutil.copytree(whole, tmp_path / "artifact", dirs_exist_ok=True)
    content = bytearray((whole / MANIFEST).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / MANIFEST).write_bytes(content)
    only_our_errors(folder)


# Hugging Face folders: the config is part of what a forger can write.


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tersor.save(tersor.compress(original("llama"), Recipe.of("nearest:int4")).model, folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 10**9}, "describes .* weights, more than model.safetensors has bits"),
        ({"vocab_size": 2**40}, "describes .* weights, more than model.safetensors has bits"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -4}, "negative dimension"),
        ({"num_attention_heads": 0}, "cannot build"),
        ({"num_hidden_layers": 5}, "lacks model.layers.2"),
        ({"num_hidden_layers": None}, "cannot build"),
        ({"hidden_act": "no such"}, "cannot build"),
        ({"model_type": "no such"}, "cannot build"),
        ({"model_type": ["llama"]}, "cannot build"),
        ({"dtype": "no such"}, "cannot build"),
        ({"rope_parameters": 3}, "cannot build"),
    ],
)
def test_a_forged_config_is_refused_before_memory_is_taken(llama, tmp_path, changed, message):
    folder = shutil.copytree(llama, tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ArtifactError, match=message):
        tersor.load(folder)


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "3", "[" * 100_000, '{"model_type": "llama"}'])
def test_a_garbled_config_is_refused(llama, tmp_path, content):
    folder = shutil.copytree(llama, tmp_path / "artifact")
    (folder / "config.json").write_text(content)
    with pytest.raises(ArtifactError):
        tersor.load(folder)


@pytest.mark.parametrize(
    "name", ["NoSuchModel", "AutoModel", "PreTrainedModel", "T5ForConditionalGeneration", "os", "Trainer", ""]
)
def test_a_forged_class_is_refused(llama, tmp_path, name):
    folder = shutil.copytree(llama, tmp_path / "artifact")
    write(folder, manifest_of(folder) | {"model": {"class": name}})
    with pytest.raises(ArtifactError, match=r"transformers cannot build the model|does not have"):
        tersor.load(folder)


def test_a_failed_write_says_where(tmp_path):
    tensors: dict[str, Tensor] = {"a": torch.zeros(3)}
    with pytest.raises(ArtifactError, match=r"nowhere/file\.safetensors: cannot write the weights"):
        write_weights(tensors, tmp_path / "nowhere" / "file.safetensors")


def test_metadata_is_what_transformers_expects():
    assert METADATA == {"format": "pt"}
