"""What holds for every export: whole or not at all, refused before work starts, and the table of clients."""

import json
from pathlib import Path

import pytest
from torch import nn

import tersor
from cli_runner import tersor as command
from tersor import EXPORTS, Recipe, export
from tersor.core.errors import FormatError, InputError, ModelError, UnknownName
from tersor.exporters.contract import Export, Runnable
from tersor.exporters.folder import PROVENANCE

HELD = {
    "gguf": "int4-g32",
    "compressed-tensors": "int4-g32",
    "gptq": "int4-g32",
    "awq": "int4-g32",
    "bitsandbytes": "nf4",
}


def place(tmp_path: Path, to: str) -> Path:
    return tmp_path / f"out{EXPORTS[to].suffix}"


def test_the_table():
    assert HELD.keys() == {name for name, export in EXPORTS.items() if not isinstance(export, Runnable)}
    assert all(isinstance(export, Export | Runnable) for export in EXPORTS.values())
    with pytest.raises(UnknownName, match="did you mean 'gguf'"):
        export("a", "b", to="ggfu")


@pytest.mark.parametrize("to", HELD)
def test_written_whole_and_replaced_only_on_demand(to, artifact, tmp_path):
    folder, output = artifact(HELD[to]), place(tmp_path, to)
    made = export(folder, output, to=to)
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    assert made.num_bytes == sum(file.stat().st_size for file in files)
    assert set(made.formats.values()) == {HELD[to]}
    with pytest.raises(InputError, match="exists"):
        export(folder, output, to=to)
    again = export(folder, output, to=to, overwrite=True)
    assert again.num_bytes == made.num_bytes
    assert list(tmp_path.iterdir()) == [output]  # no temporary files are left


@pytest.mark.parametrize("text", ["", "precious", "GGUF and more"])
def test_a_file_of_others_is_never_replaced(text, artifact, tmp_path):
    (tmp_path / "thesis.gguf").write_text(text)
    with pytest.raises(InputError, match=r"thesis.gguf: it does not say that tersor wrote it"):
        export(artifact(HELD["gguf"]), tmp_path / "thesis.gguf", to="gguf", overwrite=True)
    assert (tmp_path / "thesis.gguf").read_text() == text


@pytest.mark.parametrize("to", HELD)
def test_what_is_not_an_export_is_never_replaced(to, artifact, tmp_path):
    output = place(tmp_path, to)
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="does not touch it"):
        export(artifact(HELD[to]), output, to=to, overwrite=True)
    assert (output / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("to", HELD)
def test_a_format_the_client_cannot_hold_is_refused_with_a_rule_that_helps(to, artifact, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(FormatError) as refused:
        export(artifact(HELD[to], {name: "int6-g32-asym"}), place(tmp_path, to), to=to)
    assert f"{to} holds" in str(refused.value)
    assert f"{name} is int6-g32-asym" in str(refused.value)
    rule = str(refused.value).split("--rule '")[1].split("'")[0]
    assert rule.startswith(f"{name}=")
    assert not list(tmp_path.iterdir())
    if to not in ("gptq", "awq"):  # they want one format everywhere, see their own tests
        export(artifact(HELD[to], dict([rule.split("=")])), place(tmp_path, to), to=to)


@pytest.mark.parametrize("to", [to for to in HELD if to != "gguf"])
def test_embeddings_stay_float_in_folders(to, artifact, tmp_path):
    with pytest.raises(FormatError, match=r"model\.embed_tokens is int8-g32.*--rule 'model\.embed_tokens=bf16'"):
        export(artifact(HELD[to], {"model.embed_tokens": "int8-g32"}), place(tmp_path, to), to=to)
    export(artifact(HELD[to], {"model.embed_tokens": "bf16"}), place(tmp_path, to), to=to)


def test_what_is_no_hugging_face_artifact(llama, tmp_path):
    with pytest.raises(InputError, match=r"no tersor\.json.*tersor compress"):
        export(llama, tmp_path / "out", to="gptq")
    model = nn.Sequential(nn.Linear(64, 64))
    tersor.save(tersor.compress(model, Recipe.of("int4-g32")).model, tmp_path / "custom")
    with pytest.raises(InputError, match="custom model"):
        export(tmp_path / "custom", tmp_path / "out", to="gptq")


def test_nothing_quantized(artifact, tmp_path):
    with pytest.raises(ModelError, match="nothing to export"):
        export(artifact("bf16"), tmp_path / "out", to="gptq")


def test_the_command_line(artifact, tmp_path, capsys):
    folder = artifact("int4-g32")
    made = command(capsys, "export", folder, "--to", "gptq", "-o", tmp_path / "out", "--json")
    assert made.status == 0, made.stdout
    assert made.json["formats"]["model.layers.0.mlp.up_proj"] == "int4-g32"
    assert "float16" in made.json["notes"][0]
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text())["sites"] == made.json["formats"]
    shown = command(capsys, "export", folder, "--to", "gguf", "-o", tmp_path / "out.gguf")
    assert "14 sites for gguf" in shown.stdout
    refused = command(capsys, "export", folder, "--to", "gguf", "-o", tmp_path / "folder")
    assert refused.status == 2
    assert "folder.gguf" in refused.stderr


def test_the_targets(capsys, monkeypatch):
    listed = {row["to"]: row for row in command(capsys, "targets", "--json").json["targets"]}
    assert listed.keys() == EXPORTS.keys()
    assert listed["onnx"] | {"holds": ""} == {
        "to": "onnx",
        "writes": "*.onnx",
        "readers": "ONNX Runtime, OpenVINO",
        "holds": "",
        "models": "any",
        "checked": "onnx",
        "bench": ["onnx", "openvino", "openvino-bf16"],
        "extra": "onnx",
        "installed": True,
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert "pip install" in command(capsys, "targets").stdout
