"""`finetune` as a step of a recipe: through compress, into an artifact, and after a kill."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor import compress
from tersor.core.errors import DataError, FormatError
from tersor.recipe import Recipe
from tersor.tasks import open_task

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
"""
RUN = """
import sys
from functools import partial
import tersor.pipeline
from tersor.training.journal import Journal

tersor.pipeline.Journal = partial(Journal, seconds=0)
tersor.compress(
    "toy:make", "recipe.yaml", "classification", data="data.npz", weights="toy.safetensors", output=sys.argv[1],
    batch_sizes=1,
)
"""
RECIPE = """
steps:
- {step: finetune, num_steps: 600, batch_size: 16, learning_rate: 0.01, patience: 99}
- {step: weights, scheme: int8}
"""


@pytest.fixture
def folder(tmp_path):
    """A model, data that a line parts, and a recipe that trains it before it is quantized."""
    rng = np.random.default_rng(0)
    x, x_train = rng.normal(size=(200, 8)).astype(np.float32), rng.normal(size=(640, 8)).astype(np.float32)
    y, y_train = (array @ np.arange(-3.5, 4) > 0 for array in (x, x_train))
    np.savez(tmp_path / "data.npz", x_test=x, y_test=y.astype(int), x_train=x_train, y_train=y_train.astype(int))
    (tmp_path / "toy.py").write_text(MODEL)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_file(make().state_dict(), tmp_path / "toy.safetensors")
    return tmp_path


def make():
    names: dict = {}
    exec(MODEL, names)
    return names["make"]()


def command(folder, output):
    return [sys.executable, "-c", RUN, str(folder / output)]


def test_the_trained_model_is_what_is_compressed_written_and_told(folder, monkeypatch):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = open_task("classification", folder / "data.npz")
    made = compress(model, Recipe.from_yaml(RECIPE), task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert task.score(made.model).value > max(0.9, task.score(model).value)
    assert made.curves[0].name == "finetune"
    assert [report.scheme for report in made.sites] == ["gptq:int8"] * 2
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    data = {"data": "data.npz", "weights": "toy.safetensors"}
    tersor.compress("toy:make", "recipe.yaml", "classification", **data, output=folder / "out", batch_sizes=1)
    manifest = json.loads((folder / "out" / "tersor.json").read_text())
    training = manifest["training"][0]
    assert (training["num_steps"], len(training["losses"])) == (600, 200)
    assert "| finetune | 600 |" in (folder / "out" / "README.md").read_text()
    loaded = tersor.load(folder / "out", model=make())
    assert task.score(loaded).value == pytest.approx(manifest["scorecards"][1]["score"])
    assert not list(folder.glob(".out.journal"))


@pytest.mark.slow
def test_a_run_killed_with_sigkill_goes_on_and_ends_in_the_same_file(folder):
    subprocess.run(command(folder, "straight"), check=True, cwd=folder)
    process = subprocess.Popen(command(folder, "killed"), cwd=folder)
    file = folder / ".killed.journal" / "step-0.safetensors"
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "killed").exists()
    assert file.exists()
    subprocess.run(command(folder, "killed"), check=True, cwd=folder)
    straight, killed = (load_file(folder / name / "model.safetensors") for name in ("straight", "killed"))
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


def test_after_packing_only_what_is_left_in_float_is_trained(folder):
    model, task = make(), open_task("classification", folder / "data.npz")
    steps = "steps: [{step: weights, scheme: int4-g32}, {step: finetune, epochs: 2, learning_rate: 0.05}]"
    packed = compress(model, Recipe.from_yaml("steps: [{step: weights, scheme: int4-g32}]"), task).model
    made = compress(model, Recipe.from_yaml(steps), task).model
    before, after = packed.state_dict(), made.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"0.bias", "3.bias"}


def test_a_method_that_refills_pruned_weights_is_refused(folder):
    """The masks of a pruning step are promises to the steps after it; inputs that go together make gptq fill zeros."""
    with np.load(folder / "data.npz") as file:
        arrays = dict(file)
    for name in ("x_test", "x_train"):
        arrays[name] = arrays[name] + 3 * arrays[name][:, :1]
    np.savez(folder / "data.npz", **arrays)
    task = open_task("classification", folder / "data.npz")
    prune = "{step: prune, sparsity: 0.5, scope: site, epochs: 1}"
    recipe = Recipe.from_yaml(f"steps: [{prune}, {{step: weights, scheme: 'gptq:int4-g32'}}]")
    with pytest.raises(FormatError, match=r"fills weights that an earlier step pruned.*--exclude '0'"):
        compress(make(), recipe, task)


def test_a_recipe_that_trains_needs_training_data_before_anything_else(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    np.savez(folder / "data.npz", x=np.zeros((30, 8), np.float32), y=np.arange(30) % 2)
    with pytest.raises(DataError, match="finetune: classification was given no training data; add --train FILE"):
        compress(
            "toy:make", Recipe.from_yaml(RECIPE), "classification", data=folder / "data.npz",
            weights=folder / "toy.safetensors", output=folder / "out",
        )  # fmt: skip
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))
    with pytest.raises(DataError, match="--train FILE"):
        compress(
            nn.Sequential(nn.Linear(8, 2)),
            Recipe.from_yaml("steps: [{step: finetune}]"),
            open_task("classification", folder / "data.npz"),
        )
