"""ExecuTorch files: the same codes and scales, run by XNNPACK on its int8 kernels."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_openvino import Calibration
from torch import nn

import tersor
import tersor.exporters.check
from tersor import Recipe
from tersor.core.errors import FormatError, InputError, MissingExtra, ModelError
from tersor.exporters.check import check, difference
from tersor.exporters.examples import Examples
from tersor.exporters.executorch import ExecuTorch
from tersor.jobs.export import checkpoint_of
from tersor.runtimes import executorch as client
from tersor.runtimes import runtime_for, runtime_named

installed = pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="needs tersor[executorch]")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Latencies are not judged here."""
    monkeypatch.setattr(tersor.exporters.check, "SECONDS", 0.0)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5, bias=False))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32))


class Residual(nn.Module):
    """What ResNets and MobileNets are made of: batch norms of either sign, padding, a depthwise convolution, a shortcut
    that drops pixels, a mean of images, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, stride=2, groups=8, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        self.norm.weight.data = torch.linspace(-1, 2, 8)
        self.norm.running_mean.normal_()  # type: ignore[operator, union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(nn.functional.pad(x, (0, 1, 0, 1)))))
        y = self.project(nn.functional.relu6(self.depthwise(x)))
        return self.head(torch.relu(y + x[:, :, ::2, ::2]).mean((2, 3)))


SLOW = pytest.mark.slow
SHAPES: dict[object, tuple[int, ...]] = {linear: (5, 64), Residual: (5, 3, 8, 8)}


def written(build, scheme: str | None, folder: Path, **options):
    """The model, its examples, and what the client wrote and found."""
    torch.manual_seed(0)
    x = torch.randn(SHAPES[build]) if build in SHAPES else torch.randint(50, (3, 7))
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False, calibration=({"x": x},))
    model = build().eval()
    if scheme is not None:
        model = tersor.compress(model, Recipe.of(scheme), Calibration(examples)).model
    checkpoint, export = checkpoint_of(folder, model, examples), ExecuTorch(**options)
    export.check(checkpoint)
    made = export.write(checkpoint, folder / "out.pte", folder)
    return model, examples, made, check(export, checkpoint, folder / "out.pte", made)


@installed
@pytest.mark.parametrize(
    ("build", "scheme"),
    [
        (Residual, "int8/int8-static"),
        *(pytest.param(linear, s, marks=SLOW) for s in ("int8-dynamic", "int8", "int4", "int8/int8-static", "bf16")),
        *(pytest.param(tokens, scheme, marks=SLOW) for scheme in ("int8", "bf16")),
        pytest.param(Residual, None, marks=SLOW),
    ],
)
def test_computes_what_the_model_computes(build, scheme, tmp_path):
    model, examples, made, found = written(build, scheme, tmp_path)
    exact = runtime_named("executorch").open(made.exact or tmp_path / "out.pte")
    assert difference(exact.run({"x": examples.inputs["x"].numpy()}), examples.run(model)) < 1e-5
    assert found.difference < 0.02  # with inputs rounded to int8
    inside = next(note for note in made.notes if "in XNNPACK" in note)
    assert build is tokens or inside.endswith("in 1 part; 0 outside it")


ACTIVATIONS = [nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.GELU, nn.Sigmoid]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("layer", [lambda: nn.Linear(64, 10), lambda: nn.Conv2d(3, 8, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_before_an_int8_layer_is_computed(activation, layer, tmp_path):
    """A clamp is left to a quantizer only where that stays: a last linear layer rounds its inputs per token instead."""
    torch.manual_seed(0)
    model = nn.Sequential(activation(), layer()).eval()
    x = torch.randn(5, 64) if isinstance(model[1], nn.Linear) else torch.randn(5, 3, 8, 8)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False, calibration=({"x": x},))
    model = tersor.compress(model, Recipe.of("int8/int8-static"), Calibration(examples)).model
    checkpoint = checkpoint_of(tmp_path, model, examples)
    made = ExecuTorch().write(checkpoint, tmp_path / "out.pte", tmp_path)
    assert check(ExecuTorch(), checkpoint, tmp_path / "out.pte", made).difference < 0.02


@installed
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64-asym", "int8-g32-asym", "int2"])
def test_embeddings_are_looked_up_as_codes(scheme, tmp_path):
    model, examples, _, _ = written(lambda: nn.Sequential(nn.Embedding(50, 128)), scheme, tmp_path)
    found = runtime_named("executorch").open(tmp_path / "out.pte").run({"x": examples.inputs["x"].numpy()})
    assert difference(found, examples.run(model)) < 1e-6
    assert (tmp_path / "out.pte").stat().st_size < 50 * 128 * 2 + 4096


@installed
def test_without_calibration_convolutions_stay_exact(tmp_path):
    """Nothing gives the range of what a sum reads, so it is not rounded."""
    x = torch.randn(3, 4, 6, 6)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Hardswish(), nn.Conv2d(6, 4, 3)).eval()
    model = tersor.compress(model, Recipe.of("int8/int8-static"), Calibration(examples)).model
    made = ExecuTorch().write(checkpoint_of(tmp_path, model, examples), tmp_path / "out.pte", tmp_path)
    assert any("2 int8 convolutions run in float: give --data" in note for note in made.notes)
    found = runtime_named("executorch").open(tmp_path / "out.pte").run({"x": x.numpy()})
    assert difference(found, examples.run(model)) < 1e-5


@installed
def test_the_file_says_its_inputs_and_its_limits(tmp_path):
    path = tmp_path / "net.pte"
    made = tersor.export("test_executorch:linear", path, to="executorch", shape=(64,))
    assert made.num_bytes == path.stat().st_size
    assert [each.name for each in tmp_path.iterdir()] == ["net.pte"]
    session = runtime_for(str(path)).open(path)
    assert [(each.name, each.shape) for each in session.inputs] == [("x", (None, 64))]
    x = np.random.default_rng(0).standard_normal((32, 64), np.float32)
    whole, other = session.run({"x": x})["output"], runtime_for(str(path)).open(path, num_threads=2)
    for rows in (x[:1], x[3:20]):  # any number of rows, and after other threads have been there
        assert np.allclose(other.run({"x": rows})["output"], session.run({"x": rows})["output"], atol=1e-6)
    assert np.allclose(session.run({"x": x[:7]})["output"], whole[:7], atol=1e-6)
    with pytest.raises(InputError, match=r"net\.pte: input x is \[33, 64\]; the file holds up to \[32, 64\]"):
        session.run({"x": np.zeros((33, 64), np.float32)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"net\.pte: ExecuTorch cannot open it"):
        runtime_named("executorch").open(path)


class Ranking(nn.Module):
    """Calls what ExecuTorch has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.order = Ordered()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.order(x)


class Ordered(nn.Module):
    """The layer that does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x).values


def ranking() -> nn.Module:
    return Ranking()


@installed
@pytest.mark.slow
def test_the_profile_names_int8_kernels_and_what_runs_outside(tmp_path):
    written(Residual, "int8/int8-static", tmp_path)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)}
    found = runtime_named("executorch").open(tmp_path / "out.pte").profile(feeds, 5)
    products = [layer for layer in found.layers if layer.part == "product"]
    assert len(products) == 5  # stem, depthwise, project, the shortcut's pixels, head
    assert any("DWConv" in layer.kernel for layer in products)
    assert {(layer.precision, layer.weights) for layer in products} == {("int8", "packed")}
    assert not any(layer.kind == "Clamp" for layer in found.layers)  # int8 kernels saturate
    written(tokens, "int8", tmp_path)
    layers = runtime_named("executorch").open(tmp_path / "out.pte").profile({"x": np.ones((2, 7), np.int64)}, 5).layers
    assert [layer.kind for layer in layers].count("embedding") == 2  # codes, and scales
    assert all(layer.seconds >= 0 for layer in layers)


@installed
@pytest.mark.slow
def test_bench_takes_it_among_others(tmp_path):
    paths = [tmp_path / "net.pte", tmp_path / "net.onnx"]
    for path, to in zip(paths, ("executorch", "onnx"), strict=True):
        tersor.export("test_executorch:linear", path, to=to, shape=(64,))
    found = tersor.bench(*paths, batch_sizes=(1, 3), seconds=0.05, memory=False)
    assert [timing.candidate.runtime for timing in found.timings] == ["executorch", "onnx"] * 2


@installed
def test_an_operator_it_does_not_have_is_named_with_its_layer(tmp_path):
    with pytest.raises(ModelError, match=r"ExecuTorch has no operator for aten::sort, which order calls"):
        tersor.export("test_executorch:ranking", tmp_path / "o.pte", to="executorch", shape=(4, 3))
    assert not list(tmp_path.iterdir())


def test_refused_and_decoded(tmp_path):
    tersor.save(tersor.compress(linear(), Recipe.of("nf4")).model, tmp_path / "artifact")
    arguments = ("test_executorch:linear", tmp_path / "o.pte")
    given = {"to": "executorch", "weights": tmp_path / "artifact", "shape": (64,)}
    with pytest.raises(FormatError, match=r"executorch holds symmetric integers by row.*'0=int8'.*--decode"):
        tersor.export(*arguments, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    if importlib.util.find_spec("executorch"):
        made = tersor.export(*arguments, **given, options={"decode": True})
        assert made.check.difference < 1e-5


@pytest.mark.parametrize(
    ("layer", "scheme", "instead"),
    [
        (lambda: nn.Linear(64, 8), "int4-g32", "int8"),
        (lambda: nn.Conv2d(3, 8, 3), "int8", "int8/int8-static"),
        (lambda: nn.ConvTranspose2d(3, 8, 3), "int8", "bf16"),
        (lambda: nn.Conv3d(3, 8, 3), "int8", "bf16"),
        (lambda: nn.LSTM(8, 8), "int8", "bf16"),
    ],
)
def test_what_is_refused_has_a_scheme_that_fits(layer, scheme, instead, tmp_path):
    def misfits(scheme):
        model = tersor.compress(nn.Sequential(layer()), Recipe.of(scheme)).model
        return [ExecuTorch().why_not(packed) for packed in checkpoint_of(tmp_path, model).sites]

    assert misfits(scheme)[0].instead == instead
    assert "static" in instead or not any(misfits(instead))


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    with pytest.raises(MissingExtra, match=r"tersor\[executorch\]"):
        client.library()
    with pytest.raises(MissingExtra):
        tersor.export("test_executorch:linear", tmp_path / "o.pte", to="executorch", shape=(64,))
    assert not list(tmp_path.iterdir())
