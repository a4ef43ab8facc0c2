"""Whether this processor computes a file's int8 products exactly: by its weights, and by a trial."""

import onnx
import pytest
import torch
from torch import nn

from cli_runner import tersor as command
from tersor import Recipe, compress
from tersor.core.errors import ModelError
from tersor.exporters.check import hold
from tersor.exporters.examples import Examples
from tersor.exporters.onnx import Onnx
from tersor.exporters.openvino import OpenVinoIr
from tersor.jobs.export import checkpoint_of
from tersor.runtimes import exactness as module
from tersor.runtimes.exactness import Exactness, adds_exactly, exactness


class Net(nn.Module):
    """A convolution, one in groups, one for each channel, and a linear layer, all with weights of one sign."""

    def __init__(self):
        super().__init__()
        self.stem, self.groups = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2)
        self.each, self.head = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 5)
        for layer in self.children():
            nn.init.uniform_(layer.weight, 0.5, 1)

    def forward(self, x):
        return self.head(self.each(self.groups(self.stem(x).relu()).relu()).mean((2, 3)))


class Inputs:
    name, output, description, fingerprint = "inputs", "values", "", ""

    def __init__(self, x):
        self.x = x

    def prepare(self, original):
        pass

    def batches(self, split, batch_size=None):
        yield self.x

    def forward(self, model, batch):
        return model(batch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of one net by their suffix, for any processor and for those with VNNI alone."""
    folder, x = tmp_path_factory.mktemp("files"), torch.rand(4, 3, 10, 10)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False, calibration=({"x": x},))
    made = {}
    for cpu in ("any", "vnni"):
        model = compress(Net().eval(), Recipe.of("nearest:int8/int8-static").for_cpu(cpu), Inputs(x)).model
        for client in (Onnx(cpu=cpu), OpenVinoIr(cpu=cpu)):
            file = folder / f"{cpu}{client.suffix}"
            client.write(checkpoint_of(folder, model, examples), file, folder)
            made[cpu, client.suffix] = file
    return made


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_what_can_overflow_is_read_from_the_file(files, suffix):
    assert exactness(files["any", suffix]).overflowing == {}
    assert exactness(files["vnni", suffix]).overflowing == {"stem": 6, "groups": 6, "head": 5}


def test_dynamic_products_are_read_as_well(tmp_path):
    net, x = nn.Sequential(nn.Linear(7, 4)), torch.rand(3, 7)
    nn.init.ones_(net[0].weight)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False)
    for cpu, overflowing in (("any", {}), ("vnni", {"0": 4})):
        model = compress(net, Recipe.of("nearest:int8/int8-dynamic").for_cpu(cpu)).model
        Onnx(cpu=cpu).write(checkpoint_of(tmp_path, model, examples), tmp_path / "out.onnx", tmp_path)
        assert exactness(tmp_path / "out.onnx").overflowing == overflowing


def test_float_files_have_nothing_to_say(tmp_path):
    examples = Examples({"x": torch.rand(3, 7)}, {"x": {0: "batch"}}, keywords=False)
    Onnx().write(checkpoint_of(tmp_path, nn.Sequential(nn.Linear(7, 4)), examples), tmp_path / "out.onnx", tmp_path)
    assert exactness(tmp_path / "out.onnx") is None


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_trial_is_tried_in_the_runtime(suffix):
    """Whatever the answer is here, it is one; and the trial is a product of bytes for the runtime."""
    assert adds_exactly(suffix) in (True, False)


def test_the_trial_runs_on_bytes(tmp_path):
    import numpy as np
    import onnxruntime

    module.write_product(tmp_path / "trial.onnx", np.full((64, 16), 127, dtype=np.int8))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "trial.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert kinds & {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger"}, kinds


def test_verify_says_it(files, capsys):
    said = command(capsys, "verify", files["any", ".onnx"]).stdout
    assert ": whole; " in said
    assert "its int8 products are exact on every processor" in " ".join(said.split())
    assert "overflow 16 bits, most of all" in " ".join(command(capsys, "verify", files["vnni", ".xml"]).stdout.split())
    assert command(capsys, "verify", "some.onnx").status == 2


@pytest.mark.parametrize(
    ("exact_here", "said"),
    [(True, "multiplies it exactly on this processor"), (False, "export it again without --cpu vnni"), (None, "alone")],
)
def test_the_sentence_tells_what_was_found(exact_here, said):
    known = Exactness("runtime 1.0", {"stem": 3, "head": 5}, exact_here)
    assert said in str(known)
    assert "2 layers have weights whose products overflow 16 bits, most of all head in 5 rows" in str(known)
    assert known.is_exact == (exact_here is True)


def test_a_refusal_names_the_overflow(files, monkeypatch):
    monkeypatch.setattr(module, "adds_exactly", lambda suffix: False)
    with pytest.raises(ModelError, match=r"no VNNI instructions: 3 layers have weights .* most of all stem in 6 rows"):
        hold(0.4, 0.1, "onnx", 0.01, file=files["vnni", ".onnx"])
    with pytest.raises(ModelError, match="Leave single layers float"):
        hold(0.4, 0.1, "onnx", 0.01, file=files["any", ".onnx"])
