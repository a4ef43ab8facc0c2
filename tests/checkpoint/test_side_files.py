"""What of a model's folder a smaller one takes over, and what it leaves and says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tersor
from cli_runner import tersor as run
from tersor.checkpoint.seal import SEAL
from tersor.checkpoint.side_files import copy_side_files, left_behind
from tersor.recipe import Recipe
from zoo import original

TAKEN = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt"),
    *(
        "chat_template.jinja",
        "preprocessor_config.json",
        "1_Pooling/config.json",
        "modules.json",
        "LICENSE",
        "label.csv",
    ),
]
LEFT = [
    *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf", "optimizer.pt"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx.data", "openvino/openvino_model.bin"),
    *("openvino_model.xml", "runs/Nov01/events.out.tfevents.1", "model.safetensors.part", "modeling_own.py"),
    *(
        "coreml/model.mlpackage/Manifest.json",
        "checkpoint-500/trainer_state.json",
        "adapter.safetensors",
        "data.parquet",
    ),
]


@pytest.fixture
def folder(tmp_path):
    """A model with all of it around."""
    folder = tmp_path / "model"
    original("llama").save_pretrained(folder)
    for name in TAKEN + LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text("[]" if name == "modules.json" else "{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter.safetensors")
    with (folder / "unknown.dat").open("wb") as file:
        file.truncate(2**27 + 1)  # holes take no place on the disk
    tersor.save(tersor.compress(original("llama"), Recipe.of("nearest:int4")).model, folder / "earlier")
    (folder / "export").mkdir()
    (folder / "export" / SEAL).write_text("{}")
    (folder / "export" / "vocab.txt").write_text("of an export")
    return folder


def test_what_is_taken_and_what_is_left(folder, tmp_path):
    copy_side_files(folder, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(TAKEN)
    (note,) = left_behind(folder)
    assert note.startswith("not copied, for it is no part of the smaller model: adapter.safetensors, checkpoint-500")
    assert "model.safetensors," not in note
    assert f"and {len(LEFT) - 4 + 1 + 5 + 2} more" in note  # the unknown, the earlier artifact, the export


def test_nothing_to_say_of_a_plain_folder(tmp_path):
    original("llama").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert left_behind(tmp_path) == []
    assert left_behind(None) == []


@pytest.mark.slow
def test_compress_says_what_it_left(folder, tmp_path, capsys):
    for name in TAKEN[2:-1]:  # so that the model is one without a tokenizer
        (folder / name).unlink()
    np.savez(tmp_path / "ids.npz", x=np.arange(128).reshape(16, 8) % 30)
    flags = ["--format", "int8", "--data", str(tmp_path / "ids.npz"), "--batch", "1"]
    result = run(capsys, "compress", str(folder), "-o", str(tmp_path / "out"), *flags)
    assert "not copied, for it is no part of the smaller model: adapter.safetensors" in result.stdout + result.stderr
    notes = json.loads((tmp_path / "out" / "tersor.json").read_text())["notes"]
    assert any(note.startswith("not copied") for note in notes)
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert size < (folder / "model.safetensors").stat().st_size + 100_000
