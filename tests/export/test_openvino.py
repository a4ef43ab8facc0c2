"""OpenVINO files: the same codes and scales, run by OpenVINO on its own int8 kernels."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
import tersor.exporters.check
from tersor import Recipe
from tersor.core.errors import FormatError, InputError, MissingExtra
from tersor.exporters import openvino as client
from tersor.exporters.check import check, difference
from tersor.exporters.examples import Examples
from tersor.exporters.openvino import OpenVinoIr
from tersor.jobs.export import checkpoint_of
from tersor.runtimes import runtime_named


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Latencies are not judged here."""
    monkeypatch.setattr(tersor.exporters.check, "SECONDS", 0.0)


class Calibration:
    """The examples as a task to calibrate on."""

    name, output, description, fingerprint = "examples", "values", "", ""

    def __init__(self, examples: Examples):
        self.examples = examples

    def prepare(self, original):
        pass

    def batches(self, split, batch_size=None):
        yield self.examples.inputs

    def forward(self, model, batch):
        return self.examples.call(model, batch)

    def score(self, model, split="eval"):
        raise NotImplementedError


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32))


SLOW = pytest.mark.slow
INPUTS = {linear: (5, 128), convolutions: (3, 16, 9, 9), tokens: None}


def written(build, scheme: str, folder: Path, **options):
    """The model, its examples, and what the client wrote and found."""
    x = torch.randint(50, (3, 7)) if INPUTS[build] is None else torch.randn(INPUTS[build])
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False)
    model = tersor.compress(build().eval(), Recipe.of(scheme), Calibration(examples)).model
    checkpoint, export = checkpoint_of(folder, model, examples), OpenVinoIr(**options)
    export.check(checkpoint)
    made = export.write(checkpoint, folder / "out.xml", folder)
    return model, examples, made, check(export, checkpoint, folder / "out.xml", made)


@pytest.mark.parametrize(
    ("build", "scheme"),
    [
        *((linear, "int8-dynamic"), (tokens, "int4-g32")),
        *(
            pytest.param(linear, scheme, marks=SLOW)
            for scheme in ("int8", "int4-g32", "int4-g64-asym", "int6-g32", "bf16")
        ),
        *(pytest.param(tokens, scheme, marks=SLOW) for scheme in ("int8", "int2-g32")),
        pytest.param(convolutions, "int4-g32", marks=SLOW),
    ],
)
def test_computes_what_the_model_computes(build, scheme, tmp_path):
    model, examples, made, found = written(build, scheme, tmp_path)
    exact = runtime_named("openvino").open(made.exact or tmp_path / "out.xml")
    assert difference(exact.run({"x": examples.inputs["x"].numpy()}), examples.run(model)) < 1e-5
    assert found.difference < 0.02  # with inputs rounded to int8


@pytest.mark.parametrize("build", [pytest.param(linear, marks=SLOW), convolutions])
def test_static_int8_runs_on_int8_kernels(build, tmp_path):
    *_, made, found = written(build, "int8/int8-static", tmp_path)
    assert "OpenVINO runs 2 products in int8 on this machine" in made.notes
    assert made.exact is None
    assert found.difference < 5e-3


def test_weights_are_stored_as_small_as_they_are(tmp_path):
    written(linear, "int4-g32", tmp_path)
    num_weights = 128 * 64 + 64 * 32
    assert (tmp_path / "out.bin").stat().st_size < num_weights * (4 + 16 / 32) / 8 + 4 * (64 + 32) + 512


def test_refused_and_decoded(tmp_path):
    tersor.save(tersor.compress(linear(), Recipe.of("nf4")).model, tmp_path / "artifact")
    with pytest.raises(FormatError, match=r"openvino holds integer grids.*'0=int8'.*--decode"):
        tersor.export(
            "test_openvino:linear", tmp_path / "o.xml", to="openvino", weights=tmp_path / "artifact", shape=(128,)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    *_, found = written(linear, "nf4", tmp_path, decode=True)
    assert found.difference < 1e-3


def test_both_files_appear_and_are_replaced(tmp_path):
    for _ in range(2):
        made = tersor.export("test_openvino:linear", tmp_path / "o.xml", to="openvino", shape=(128,), overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} == {"o.xml", "o.bin"}
        assert made.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("there", ["o.xml", "o.bin", "both"])
def test_files_of_others_are_never_replaced(there, tmp_path):
    """A model.bin may well be somebody's PyTorch weights, beside a file of ours as well."""
    make = {"to": "openvino", "shape": (128,)}
    if there == "both":
        tersor.export("test_openvino:linear", tmp_path / "o.xml", **make)
    mine = tmp_path / ("o.bin" if there == "both" else there)
    mine.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"o\.(xml|bin).*choose another --output"):
            tersor.export("test_openvino:linear", tmp_path / "o.xml", overwrite=overwrite, **make)
    assert mine.read_text() == "precious"


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"tersor\[openvino\]"):
        client.library()


def test_openvino_sends_no_reports():
    """Its package of reports is there, and is not used: checked in a new process, before anything has imported it."""
    program = (
        "from tersor.runtimes.openvino import library\n"
        "library()\n"
        "import openvino.tools.ovc.telemetry_utils as used\n"
        "print(used.tm.__name__)"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert made.stdout.strip().endswith("telemetry_stub")
