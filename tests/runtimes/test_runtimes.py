"""Runtimes: each gives what NumPy or PyTorch gives, declares what it takes, refuses what it does not, and its profile
counts the operations that can be counted by hand."""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from graphs import convolution, integer_mlp, mlp
from torch import nn

import tersor
from tersor.core.errors import InputError, MissingExtra, ModelError, UnknownName
from tersor.formats.contract import Encoded
from tersor.kernels import kernel_of
from tersor.runtimes import RUNTIMES, open_session, runtime_for
from tersor.runtimes.feeds import feeds_from, synthetic_feeds
from tersor.runtimes.torch import TorchSession
from tersor.runtimes.torch_profile import Stopwatch
from tersor.runtimes.torch_profile import profile as stopwatch

FILES = [name for name, runtime in RUNTIMES.items() if ".onnx" in runtime.suffixes]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


# What they give.


@pytest.mark.parametrize("runtime", FILES)
def test_a_file_gives_what_numpy_gives_at_any_batch(runtime, tmp_path):
    path, weight = mlp(tmp_path / "mlp.onnx")
    session = open_session(str(path), runtime)
    (declared,) = session.inputs
    assert (declared.name, declared.dtype, declared.shape) == ("x", np.float32, (None, 64))
    tolerance = 0.05 if runtime.endswith("bf16") else 1e-5
    for batch in (1, 3):
        x = numbers(batch, 64)
        np.testing.assert_allclose(session.run({"x": x})["y"], np.maximum(x @ weight, 0), atol=8 * tolerance)


@pytest.mark.parametrize("runtime", FILES)
def test_an_earlier_result_is_not_overwritten_by_a_later_run(runtime, tmp_path):
    session = open_session(str(mlp(tmp_path / "mlp.onnx")[0]), runtime)
    first = session.run({"x": numbers(1, 64)})["y"]
    kept = first.copy()
    session.run({"x": -numbers(1, 64)})
    np.testing.assert_array_equal(first, kept)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


def test_torch_gives_what_the_model_gives_and_leaves_the_threads_alone():
    model, before = small().eval(), torch.get_num_threads()
    session = TorchSession(model, "small")
    x = numbers(2, 64)
    np.testing.assert_array_equal(session.run({"input": x})["output"], model(torch.from_numpy(x)).detach().numpy())
    assert torch.get_num_threads() == before


def test_torch_knows_the_inputs_of_a_language_model_and_of_first_layers(minilm):
    found = open_session(str(minilm)).inputs
    assert [each.name for each in found] == ["input_ids", "attention_mask"]
    assert {each.dtype for each in found} == {np.dtype(np.int64)}
    assert TorchSession(nn.Sequential(nn.Conv2d(3, 4, 3)), "").inputs[0].shape == (None, 3, None, None)
    assert TorchSession(nn.Sequential(nn.Embedding(9, 4)), "").inputs[0].dtype == np.int64


def test_torch_says_when_it_cannot_tell_the_inputs():
    with pytest.raises(InputError, match=r"nameless: cannot tell what it must be fed.*--data"):
        TorchSession(nn.ReLU(), "nameless")


# What they refuse.


@pytest.mark.parametrize("runtime", FILES)
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"lacks x; its inputs are x"),
        ({"x": numbers(1, 64), "z": numbers(1)}, r"does not take z; the inputs are x"),
        ({"x": numbers(1, 63)}, r"input x is float32 \[1, 63\]; declared: float32 \['any', 64\]"),
        ({"x": numbers(1, 64).astype(np.float64)}, r"input x is float64"),
    ],
)
def test_wrong_feeds_are_refused_by_name(runtime, feeds, message, tmp_path):
    session = open_session(str(mlp(tmp_path / "mlp.onnx")[0]), runtime)
    with pytest.raises(InputError, match=message):
        session.run(feeds)


@pytest.mark.parametrize("runtime", FILES)
def test_missing_and_damaged_files_are_refused(runtime, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        open_session(str(tmp_path / "none.onnx"), runtime)
    path = mlp(tmp_path / "mlp.onnx")[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"mlp\.onnx: .* cannot"):
        open_session(str(path), runtime)


@pytest.mark.parametrize(("runtime", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_library_is_an_extra_to_install(runtime, module, tmp_path, monkeypatch):
    path = mlp(tmp_path / "mlp.onnx")[0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'tersor\[{runtime}\]'"):
        open_session(str(path), runtime)
    with pytest.raises(MissingExtra):
        RUNTIMES[runtime].version()


def test_the_file_chooses_the_runtime(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.onnx", "model.xml", "model.tflite"):
        Path(name).touch()
    assert runtime_for("model.onnx").name == "onnx"
    assert runtime_for("model.xml").name == "openvino"
    assert runtime_for("some.package:factory").name == "torch"
    assert runtime_for(str(tmp_path)).name == "torch"
    with pytest.raises(InputError, match=r"torch opens folders; export the model first|onnx opens \.onnx"):
        runtime_for(str(tmp_path), "onnx")
    with pytest.raises(UnknownName, match="did you mean 'openvino'"):
        runtime_for("model.onnx", "openvin")
    with pytest.raises(InputError, match=r"no runtime opens \*\.tflite"):
        runtime_for("model.tflite")


def test_a_missing_file_is_said_before_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        open_session("gone.onnx")


# What they are fed.


def test_made_up_inputs_fit_and_are_the_same_for_every_session(tmp_path, minilm):
    inputs = open_session(str(minilm)).inputs
    feeds = synthetic_feeds(inputs, batch_size=2, length=7)
    assert {name: array.shape for name, array in feeds.items()} == {"input_ids": (2, 7), "attention_mask": (2, 7)}
    assert feeds["attention_mask"].all()
    assert 0 < feeds["input_ids"].min() <= feeds["input_ids"].max() < 50
    again = synthetic_feeds(inputs, batch_size=2, length=7)
    np.testing.assert_array_equal(feeds["input_ids"], again["input_ids"])


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    inputs = open_session(str(convolution(tmp_path / "conv.onnx"))).inputs
    with pytest.raises(InputError, match=r"leaves its size open .*--shape 3,32,32"):
        synthetic_feeds(inputs)
    with pytest.raises(InputError, match="--shape 3,8,8 does not fit input x, which is 16, any, any"):
        synthetic_feeds(inputs, shape=(3, 8, 8))
    assert synthetic_feeds(inputs, batch_size=2, shape=(16, 8, 8))["x"].shape == (2, 16, 8, 8)


def test_a_tasks_batch_is_fed_by_name_or_by_being_the_only_input(minilm):
    inputs = open_session(str(minilm)).inputs
    ids = torch.ones(2, 5, dtype=torch.int32)
    feeds = feeds_from({"input_ids": ids}, inputs)
    assert feeds["input_ids"].dtype == np.int64
    assert feeds["attention_mask"].tolist() == [[1] * 5] * 2
    alone = TorchSession(small(), "").inputs
    assert feeds_from({"x": torch.zeros(2, 64)}, alone)["input"].shape == (2, 64)
    with pytest.raises(InputError, match="takes input, and the task's examples hold a, b"):
        feeds_from({"a": ids, "b": ids}, alone)


# What their profiles say.


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_profile_counts_a_products_operations_by_hand(runtime, tmp_path):
    session = open_session(str(mlp(tmp_path / "mlp.onnx", 512, 1024)[0]), runtime)
    profile = session.profile({"x": numbers(8, 512)}, 5)
    (product,) = [layer for layer in profile.layers if layer.part == "product"]
    assert product.macs == 8 * 512 * 1024
    assert product.num_bytes >= 4 * 512 * 1024
    assert (product.precision, product.weights) == ("fp32", "float")
    assert product.seconds > 0
    assert profile.num_calls == len(profile.layers)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_profile_counts_a_grouped_convolution_by_hand(runtime, tmp_path):
    session = open_session(str(convolution(tmp_path / "conv.onnx")), runtime)
    profile = session.profile({"x": numbers(2, 16, 48, 48)}, 5)
    product = max(profile.layers, key=lambda layer: layer.macs)
    assert product.macs == 2 * 48 * 48 * 32 * 8 * 9


def test_onnx_tells_integer_products_and_quantizers_apart(tmp_path):
    session = open_session(str(integer_mlp(tmp_path / "mlp.onnx")))
    layers = session.profile({"x": numbers(4, 256)}, 5).layers
    (product,) = [layer for layer in layers if layer.part == "product"]
    assert (product.precision, product.weights, product.macs) == ("int8", "packed", 4 * 256 * 128)
    assert "quantize" in {layer.part for layer in layers}


def test_torch_attributes_decoding_and_products_to_their_modules():
    packed = tersor.compress(small(), tersor.Recipe.of("int4-g32/int8-dynamic")).model  # a pair without a kernel
    profile = TorchSession(packed, "packed").profile({"input": numbers(4, 64)}, 5)
    found = {(layer.name, layer.part): layer for layer in profile.layers}
    assert {("0", "decode"), ("0", "product"), ("2", "decode"), ("2", "product")} <= found.keys()
    assert found["0", "product"].macs == 4 * 64 * 32
    assert found["0", "product"].weights == "packed"
    assert found["0", "product"].kernel == "linear on the decoded weight"
    assert found["1", "other"].kind == "ReLU"
    assert sum(layer.seconds for layer in profile.layers) <= profile.seconds * 1.5


def test_torch_sees_int8_products_and_what_quantizes_for_them():
    packed = tersor.compress(small(), tersor.Recipe.of("int8-dynamic")).model
    profile = TorchSession(packed, "packed").profile({"input": numbers(4, 64)}, 5)
    found = {(layer.name, layer.part): layer for layer in profile.layers}
    assert found["0", "product"].precision == "int8"
    assert found["0", "quantize"].seconds > 0
    assert ("0", "decode") not in found


class Planted(nn.Module):
    """One child does forty times the work of the other."""

    def __init__(self):
        super().__init__()
        self.light, self.heavy = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x):
        for _ in range(40):
            y = self.heavy(x)
        return self.light(y)


def test_torch_finds_the_planted_share(one_thread):
    profile = TorchSession(Planted(), "planted").profile({"x": numbers(64, 256)}, 9)
    seconds = {layer.name: layer.seconds for layer in profile.layers if layer.part == "product"}
    assert seconds["heavy"] / seconds["light"] == pytest.approx(40, rel=0.5)


KERNELS = {  # layer, shape of its input, scheme, type, the product that runs
    "int8pack": (lambda: nn.Linear(1024, 2048), (1, 1024), "int8", torch.bfloat16, "_weight_int8pack_mm"),
    "int4pack": (lambda: nn.Linear(1024, 2048), (1, 1024), "int4-g32", torch.bfloat16, "_weight_int4pack_mm_for_cpu"),
}
LOOPS = {  # whose work PyTorch's own profiler does not see
    "linear": (lambda: nn.Linear(1024, 256), (40, 1024), "int8-dynamic"),
    "weights alone": (lambda: nn.Linear(1024, 256), (40, 1024), "int4-g64"),
    "LSTM": (lambda: nn.LSTM(320, 320), (9, 8, 320), "int8-dynamic"),
    "GRU": (lambda: nn.GRU(320, 320), (9, 8, 320), "int8-dynamic"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_torch_sees_the_work_of_compiled_loops(name, one_thread, monkeypatch):
    """It is one product of the layer, and most of what the layer does."""
    monkeypatch.setattr(
        "tersor.kernels.choice.fastest", lambda times: "unpack" if "unpack" in times else next(iter(times))
    )
    layer, shape, scheme = LOOPS[name]
    model = tersor.compress(nn.Sequential(layer()).eval(), tersor.Recipe.of(scheme)).model
    x = torch.from_numpy(numbers(*shape))

    def run():
        with torch.inference_mode():
            model(x)

    layers = stopwatch(model, run, 9).layers
    (product,) = [layer for layer in layers if layer.part == "product"]
    assert (product.name, product.weights) == ("0", "packed")
    assert product.kernel == ("unpack" if name == "weights alone" else kernel_of(model[0], 40))
    assert product.precision == ("fp32" if name == "weights alone" else "int8")
    assert product.seconds > 0.3 * sum(layer.seconds for layer in layers)


@pytest.mark.parametrize("name", KERNELS)
def test_torch_names_the_kernel_and_its_share_as_torchs_own_profiler_does(name, one_thread, monkeypatch):
    monkeypatch.setattr("tersor.kernels.choice.fastest", lambda times: next(iter(times)))  # however busy the machine is
    layer, shape, scheme, dtype, kernel = KERNELS[name]
    model = tersor.compress(nn.Sequential(layer()).eval(), tersor.Recipe.of(scheme)).model.to(dtype)
    x = torch.from_numpy(numbers(*shape)).to(dtype)

    def run():
        with torch.inference_mode():
            model(x)

    layers = stopwatch(model, run, 15).layers
    (product,) = [layer for layer in layers if layer.part == "product"]
    assert (product.name, product.kernel, product.weights) == ("0", kernel, "packed")
    assert product.macs == sum(weight.numel() for weight in layer().parameters() if weight.ndim == 2) * (
        x.numel() // x.shape[-1]
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(15):
            run()
    each = defaultdict(list)
    for event in profiler.events():
        each[event.name].append(event.self_cpu_time_total)
    spent = {
        kind: len(times) * median(times) for kind, times in each.items()
    }  # waiting for other processes is left out
    share = product.seconds / sum(layer.seconds for layer in layers)
    assert share == pytest.approx(spent[f"aten::{kernel}"] / sum(spent.values()), abs=0.2)


def test_the_stopwatch_leaves_no_trace_when_a_model_fails():
    decode = Encoded.decode
    model = small()
    with pytest.raises(RuntimeError), Stopwatch(model):
        model(torch.zeros(2, 63))
    assert Encoded.decode is decode
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks
