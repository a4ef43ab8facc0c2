"""ONNX files: run by ONNX Runtime, they compute what the model computes, with exactly its codes and scales."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import numpy_helper
from torch import nn

import tersor
import tersor.exporters.check
from cli_runner import tersor as command
from tersor import Recipe, export
from tersor.checkpoint.layout import packed_sites
from tersor.checkpoint.open import open_model
from tersor.core.errors import FormatError, InputError, MissingExtra, ModelError
from tersor.exporters import onnx as client
from tersor.exporters.check import difference
from tersor.exporters.examples import Examples, outputs_of
from tersor.exporters.onnx import Onnx, file, layers
from tersor.exporters.onnx.blocks import rotary_tables
from tersor.exporters.rescaled import for_any_processor
from tersor.formats.overflow import keeps_pair_rule
from tersor.jobs.export import checkpoint_of
from tersor.runtimes import runtime_named
from zoo import GQA, ZOO, pretrained


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Latencies are not judged here."""
    monkeypatch.setattr(tersor.exporters.check, "SECONDS", 0.0)


SLOW = pytest.mark.slow
LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)),
    "lstm": lambda: nn.LSTM(12, 10, num_layers=2, batch_first=True),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2)),
}
SHAPES = {"linear": (40,), "lstm": (7, 12), "depthwise": (4, 9, 9)}


def packed(name: str, scheme: str) -> tuple[nn.Module, Examples]:
    """A small model under a scheme, with its inputs; the axes of any size are those of a batch and of texts."""
    if name in LAYERS:
        model, inputs, keywords = LAYERS[name]().eval(), {"x": torch.randn(3, *SHAPES[name])}, False
    else:
        model, arguments = ZOO[name].model(), ZOO[name].arguments(ZOO[name].model())
        keywords = isinstance(arguments, dict)
        inputs = arguments if keywords else {f"x{i}": x for i, x in enumerate(arguments)}
    axes = {n: {0: "batch", 1: "sequence"} if keywords and x.dim() == 2 else {0: "batch"} for n, x in inputs.items()}
    examples = Examples(inputs, axes, keywords)
    return tersor.compress(model, Recipe.of(scheme), Calibration(examples)).model, examples


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
        return next(iter(outputs_of(self.examples.call(model, batch)).values()))

    def score(self, model, split="eval"):
        raise NotImplementedError


def write(model: nn.Module, examples: Examples, folder: Path, **options):
    """The files that the client writes: the one to keep, and the one that rounds exactly as the artifact does."""
    checkpoint, export = checkpoint_of(folder, model, examples), Onnx(**options)
    assert not [p.site.name for p in checkpoint.sites if export.why_not(p)]
    export.check(checkpoint)
    written = export.write(checkpoint, folder / "out.onnx", folder)
    tersor.exporters.check.check(export, checkpoint, folder / "out.onnx", written)
    return folder / "out.onnx", written.exact or folder / "out.onnx"


def run(path: Path, examples: Examples) -> dict[str, np.ndarray]:
    return runtime_named("onnx").open(path).run({name: tensor.numpy() for name, tensor in examples.inputs.items()})


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("linear", scheme) for scheme in ("int8-dynamic", "int8/int8-static", "int2-g32", "int4-g32-asym")),
        *(("depthwise", "int8/int8-static"), ("lstm", "int8"), ("tied head", "int4-g32"), ("tied head", "int8")),
        *(pytest.param("linear", scheme, marks=SLOW) for scheme in ("int8", "int3-g64", "int4/int8-dynamic", "bf16")),
        *(pytest.param(name, "int4-g32", marks=SLOW) for name in ("depthwise", "self attention", "experts")),
        *(pytest.param(name, "int8", marks=SLOW) for name in ("conv transposed", "embedding")),
        *(pytest.param(name, "int6", marks=SLOW) for name in ("gpt2", "bert", "mixtral", "whisper")),
    ],
)
def test_computes_what_the_model_computes(name, scheme, tmp_path):
    model, examples = packed(name, scheme)
    _, exact = write(model, examples, tmp_path)
    # ONNX Runtime rounds the bias of an int8 convolution, by at most half a step of its sums.
    tolerance = 5e-3 if (name, scheme) == ("depthwise", "int8/int8-static") else 1e-5
    assert difference(run(exact, examples), examples.run(model)) < tolerance


@pytest.mark.slow
def test_rounded_inputs_stay_as_close_as_rounding_lets_them(tmp_path):
    """Deep in a model, float sums in another order put some inputs on the other side of a half."""
    model, examples = packed("bert", "int8-dynamic")
    kept, exact = write(model, examples, tmp_path)
    assert difference(run(exact, examples), examples.run(model)) < 0.02
    assert 0.0 < difference(run(kept, examples), examples.run(model)) < 0.05


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """The artifact of a small language model with a tied head: int4 weights, and int8 rows of its embedding."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model = pretrained("LlamaForCausalLM", tie_word_embeddings=True, **{**GQA, "num_hidden_layers": 1})()
    tersor.save(tersor.compress(model, Recipe.of("int4-g32", {"model.embed_tokens": "int8"})).model, folder)
    return folder


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "llama.onnx"
    return export(llama, output, to="onnx", options={"cache": False})


def test_holds_exactly_our_codes_and_scales(llama, exported):
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(exported.output).graph.initializer}
    site, weight, _ = next(each for each in packed_sites(tersor.load(llama)) if each[0].name.endswith("up_proj"))
    codes, scale = weight.encoded.parts["codes"].numpy(), weight.encoded.parts["scale"].numpy()
    assert np.array_equal(held[f"{site.name}.scales"], scale.astype(np.float32))
    assert np.array_equal(held[f"{site.name}.blocks"].reshape(len(codes), -1), codes)


def test_a_language_model_takes_texts_of_any_number_and_length(llama, exported):
    session = runtime_named("onnx").open(exported.output)
    assert {each.name: each.shape for each in session.inputs} == {
        "input_ids": (None, None),
        "attention_mask": (None, None),
    }
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = tersor.load(llama).float()(ids, attention_mask=mask).logits
    made = session.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"]
    assert np.abs(made - expected.numpy())[mask.bool().numpy()].max() < 0.1 * expected.abs().max()


def test_what_is_reported(exported):
    assert exported.formats["model.embed_tokens"] == "int8"
    assert any("opset 21, IR 10; batch and sequence of any size" in note for note in exported.notes)
    assert any("MatMulNBits to int8" in note for note in exported.notes)
    assert exported.check.runtime.startswith("onnxruntime")
    assert exported.check.difference < 0.1
    assert exported.num_bytes == exported.output.stat().st_size
    assert str(Path(torch.__file__).parent).encode() not in exported.output.read_bytes()


def test_a_mixup_is_never_kept(monkeypatch, tmp_path):
    """Two rows of one weight in the wrong order."""
    right = layers.blocks
    monkeypatch.setattr(layers, "blocks", lambda packed: right(packed).roll(1, dims=0))
    tersor.save(tersor.compress(linear(), Recipe.of("int4-g32")).model, tmp_path / "artifact")
    with pytest.raises(ModelError, match=r"outputs differ from the model's by .* nothing was written"):
        export("test_onnx:linear", tmp_path / "o.onnx", to="onnx", weights=tmp_path / "artifact", shape=(40,))
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


class Residual(nn.Module):
    """Two convolutions with batch norms around which a shortcut leads, and a third."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        for norm in (self.norm1, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        inner = torch.relu(self.norm1(self.conv1(x)))
        return self.conv3(torch.relu(inner + self.norm2(self.conv2(inner))))


def convolutions(path: Path) -> list[tuple[bool, bool]]:
    """Of every convolution: whether it has a bias, and whether only quantizers read its result, or that of its ReLU."""
    graph = onnx.load(path).graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    readers = {n: [node for node in graph.node if n in node.input] for node in graph.node for n in node.output}
    found = []
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        after = readers[conv.output[0]]
        if [node.op_type for node in after] == ["Relu"]:
            after = readers[after[0].output[0]]
        found.append((len(conv.input) > 2, bool(after) and {node.op_type for node in after} == {"QuantizeLinear"}))
    return found


def test_int8_convolutions_of_residual_blocks(tmp_path):
    x = torch.randn(4, 8, 9, 9)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False)
    model = tersor.compress(Residual().eval(), Recipe.of("int8/int8-static"), Calibration(examples)).model
    as_it_is, _ = write(model, examples, tmp_path)
    assert difference(run(as_it_is, examples), examples.run(model)) < 0.02
    # Both results that go into the sum are float: one of them meets a quantizer, too.
    assert convolutions(as_it_is) == [(True, True), (True, False), (False, False)]
    whole = replace(examples, calibration=({"x": x},))
    rounded, exact = write(model, whole, tmp_path)
    assert convolutions(rounded) == [(True, True), (True, True), (False, False)]
    assert difference(run(rounded, examples), examples.run(model)) < 0.03
    assert difference(run(exact, examples), examples.run(model)) < 5e-3
    left, _ = write(model, whole, tmp_path, float_outputs=True)
    assert convolutions(left) == [(True, False), (True, False), (False, False)]


class Shrinking(Residual):
    """A shortcut that drops pixels and adds channels, then a pool: what a ResNet for CIFAR-10 is made of."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(super().forward(x))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = torch.relu(self.wide(x) + short)
        return self.head(nn.functional.avg_pool2d(x, x.shape[-1]).flatten(1))


def test_the_whole_residual_chain_runs_on_codes(tmp_path):
    x = torch.randn(4, 8, 9, 9)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False, calibration=({"x": x},))
    model = tersor.compress(Shrinking().eval(), Recipe.of("int8/int8-static"), Calibration(examples)).model
    written, _ = write(model, examples, tmp_path)
    assert difference(run(written, examples), examples.run(model)) < 0.05
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QLinearAveragePool"]) == (4, 2, 1)
    assert not {"Conv", "Relu", "AveragePool", "FusedConv"} & set(kinds)
    assert kinds["QuantizeLinear"] == 1  # of the input


def optimized(path: Path) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(path.with_suffix(".optimized")).graph


@pytest.mark.parametrize(
    ("name", "scheme", "products", "num_others"),
    [
        ("linear", "int8-dynamic", {"DynamicQuantizeMatMul"}, 0),
        ("linear", "int8/int8-static", {"QGemm", "MatMulIntegerToFloat"}, 0),
        ("linear", "int4-g32", {"MatMulNBits"}, 0),
        ("depthwise", "int8/int8-static", {"QLinearConv"}, 1),  # the last, whose result is float
        pytest.param("bert", "int8-dynamic", {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}, 0, marks=SLOW),
    ],
)
def test_what_runs_in_the_place_of_a_site_is_named_after_it(name, scheme, products, num_others, tmp_path):
    model, examples = packed(name, scheme)
    examples = replace(examples, calibration=(examples.inputs,))
    kept, _ = write(model, examples, tmp_path)
    names = [node.name for node in onnx.load(kept).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    graph = optimized(kept)
    sites = {site.name: site for site, _, _ in packed_sites(model)}
    found = [node.name.split("/")[0] for node in graph.node if node.op_type in products]
    assert len(found) == len(set(found))
    assert set(found) <= sites.keys()
    assert len(found) == sum(site.kind in ("linear", "conv") for site in sites.values()) - num_others


def test_norms_and_small_tables_run_on_their_fast_kernels(tmp_path):
    """A sum and a norm apart, a table of positions decoded when the file is loaded."""
    model, examples = packed("bert", "int8")
    kept, exact = write(model, examples, tmp_path)
    assert difference(run(exact, examples), examples.run(model)) < 1e-5
    graph = optimized(kept)
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["LayerNormalization"] == sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert kinds["Sum"] == kinds["LayerNormalization"]
    assert not kinds["SkipLayerNormalization"]
    assert [n.op_type for n in graph.node if "embeddings.position_embeddings/" in n.name] == ["Gather"]


class Padded(nn.Module):
    """Zeros on two sides of an image, then of what a convolution gives; a head on the average."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.relu6(self.norm(self.first(nn.functional.pad(x, (0, 1, 0, 1)))))
        x = self.second(nn.functional.pad(x, (1, 0, 2, 0)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("scheme", ["int8/int8-static", "int8"])
def test_padding_is_the_convolutions_and_a_head_on_floats_runs_in_integers(scheme, tmp_path):
    x = torch.randn(4, 3, 12, 12)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False, calibration=({"x": x},))
    model = tersor.compress(Padded().eval(), Recipe.of(scheme), Calibration(examples)).model
    written, exact = write(model, examples, tmp_path)
    assert difference(run(exact, examples), examples.run(model)) < (5e-3 if "static" in scheme else 1e-5)
    graph = onnx.load(written).graph
    assert [list(a.ints) for n in graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "pads"] == [
        [0, 0, 1, 1],
        [3, 2, 1, 1],
    ]
    made = optimized(written)
    constants = {each.name for each in made.initializer}
    kinds = Counter(node.op_type for node in made.node)
    assert not kinds["Pad"]
    if "static" in scheme:
        assert kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"] == 3
        assert not [n.name for n in made.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]


class Strange(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x):
        return torch.special.airy_ai(x)


class Halves(nn.Module):
    """A model that works for one length only."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 4), nn.Linear(6, 6)

    def forward(self, x):
        return self.mix(self.embed(x).transpose(1, 2))


def test_an_operator_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), Strange()))
    examples = Examples({"x": torch.randn(2, 8)}, {"x": {0: "batch"}}, keywords=False)
    with pytest.raises(ModelError, match=r"no operator for aten\.special_airy_ai.*which 1\.1 calls"):
        write(model, examples, tmp_path)


def test_an_axis_of_one_size_is_refused_until_it_is_fixed(tmp_path):
    examples = Examples({"x": torch.randint(20, (2, 6))}, {"x": {0: "batch", 1: "sequence"}}, keywords=False)
    with pytest.raises(ModelError, match=r"sequence 6 of x only.*--fixed sequence"):
        write(Halves(), examples, tmp_path)
    with pytest.raises(InputError, match=r"no axis 'length' to fix; the inputs have batch, sequence"):
        examples.fixed(["length"])
    kept, _ = write(Halves(), examples.fixed(["sequence"]), tmp_path)
    assert runtime_named("onnx").open(kept).inputs[0].shape == (None, 6)


def factory() -> nn.Module:
    """What the command line names as `test_onnx:factory`."""
    return LAYERS["depthwise"]()


def linear() -> nn.Module:
    """`test_onnx:linear`."""
    return LAYERS["linear"]()


@pytest.fixture
def custom(tmp_path) -> Path:
    """The artifact of a model of our own, in a format that ONNX has no operators for."""
    folder = tmp_path / "artifact"
    tersor.save(tersor.compress(factory(), Recipe.of("nf4")).model, folder)
    return folder


def test_other_formats_are_refused_with_a_rule_or_decoded(custom, tmp_path):
    make = {"model": "test_onnx:factory", "weights": custom, "shape": (4, 9, 9), "to": "onnx"}
    output = tmp_path / "out.onnx"
    with pytest.raises(FormatError, match=r"onnx holds integer grids.*0 is nf4 \(1 more.*--rule '0=int8'.*--decode"):
        export(output=output, **make)
    assert not output.exists()
    made = export(output=output, options={"decode": True}, **make)
    assert any("decoded fp16 weights with float inputs: nf4" in note for note in made.notes)
    assert made.check.difference < 1e-3


def test_the_command_line(custom, tmp_path, capsys):
    output = tmp_path / "out.onnx"
    given = ["test_onnx:factory", "--weights", custom, "--to", "onnx", "-o", output, "--decode"]
    assert "--data FILE, or --shape" in command(capsys, "export", *given).stderr
    made = command(capsys, "export", *given, "--shape", "4,9,9", "--json")
    assert made.status == 0, made.stdout
    assert made.json["check"]["difference"] < 1e-3
    assert made.json["check"]["latency"]["p50"] > 0
    assert "not a list of whole numbers" in command(capsys, "export", *given, "--shape", "4x9").stderr
    shown = command(capsys, "export", *given, "--shape", "4,9,9", "--overwrite")
    assert "outputs differ from the model's by" in shown.stdout
    assert (
        "gguf takes no option decode"
        in command(capsys, "export", custom, "--to", "gguf", "-o", tmp_path / "out.gguf", "--decode").stderr
    )


def test_a_model_that_is_not_compressed(tmp_path):
    make = {"model": "test_onnx:factory", "shape": (4, 9, 9), "to": "onnx"}
    made = export(output=tmp_path / "fp32.onnx", **make)
    assert made.check.difference < 1e-5
    half = export(output=tmp_path / "fp16.onnx", options={"dtype": "fp16"}, **make)
    assert runtime_named("onnx").open(half.output).inputs[0].dtype == np.float16
    assert {t.data_type for t in onnx.load(half.output).graph.initializer} == {onnx.TensorProto.FLOAT16}
    with pytest.raises(InputError, match="--dtype int8 is not one of fp32, fp16"):
        export(output=tmp_path / "int8.onnx", options={"dtype": "int8"}, **make)


def test_half_precision_needs_float_inputs(tmp_path):
    model, examples = packed("linear", "int8/int8-static")
    with pytest.raises(FormatError, match=r"float inputs; 0 is int8/int8-static; leave --dtype out"):
        write(model, examples, tmp_path, dtype="fp16")
    model, examples = packed("linear", "int4-g32")
    _, exact = write(model, examples, tmp_path, dtype="fp16")
    assert difference(run(exact, examples.cast(torch.float16)), examples.run(model)) < 1e-2


def test_large_weights_lie_beside_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(file, "LARGEST", 100)
    output = tmp_path / "out.onnx"
    for _ in range(2):
        made = export("test_onnx:factory", output, to="onnx", shape=(4, 9, 9), overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}
        assert made.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    output.with_name("out.onnx.data").write_text("precious")
    with pytest.raises(InputError, match=r"out.onnx.data beside it was not written with it"):
        export("test_onnx:factory", output, to="onnx", shape=(4, 9, 9), overwrite=True)
    assert output.with_name("out.onnx.data").read_text() == "precious"


def test_large_weights_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(file, "LARGEST", 100)
    output = tmp_path / "out.onnx"
    export("test_onnx:factory", output, to="onnx", shape=(4, 9, 9))
    assert not [t for t in onnx.load(output, load_external_data=False).graph.initializer if len(t.raw_data) > 300]
    assert runtime_named("onnx").open(output).inputs[0].shape == (None, 4, 9, 9)


@pytest.mark.parametrize("text", ["", "precious", "tersor"])
def test_a_file_of_others_is_never_replaced(text, tmp_path):
    (tmp_path / "thesis.onnx").write_text(text)
    with pytest.raises(InputError, match=r"thesis.onnx: it does not say that tersor wrote it"):
        export("test_onnx:factory", tmp_path / "thesis.onnx", to="onnx", shape=(4, 9, 9), overwrite=True)
    assert (tmp_path / "thesis.onnx").read_text() == text


def test_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"tersor\[onnx\]"):
        client.require()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "embedding", "most"), [("int8-dynamic", "int8", 23e6), ("int4-g32", "int4-g32", 14.3e6)]
)
def test_the_whole_of_minilm(minilm, scheme, embedding, most, tmp_path):
    source = open_model(str(minilm))
    model = tersor.compress(source.model, Recipe.of(scheme, {"embeddings.*": embedding})).model
    tersor.save(model, tmp_path / "artifact", source=source.folder)
    made = export(tmp_path / "artifact", tmp_path / "out.onnx", to="onnx")
    assert made.num_bytes <= most


def test_rotary_embeddings_that_differ_between_layers_have_no_one_table():
    """Gemma 3 turns its local and its global layers by other angles."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    gemma3 = transformers.Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    assert rotary_tables(transformers.Gemma3ForCausalLM(gemma3)) is None
    llama = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    assert rotary_tables(transformers.LlamaForCausalLM(llama))[0].shape == (64, 8)


class Overflowing(nn.Module):
    """Layers whose weights are large, and of one sign."""

    def __init__(self):
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)
        for layer in (self.conv, self.middle, self.head):
            nn.init.uniform_(layer.weight, 0.5, 1)

    def forward(self, x):
        return self.head(self.middle(self.conv(x).relu().mean((2, 3))))


def overflowing(folder: Path) -> tuple[nn.Module, Examples]:
    """An artifact whose weights were left free, as those written before tersor knew of the difference."""
    x = torch.rand(4, 3, 8, 8)
    examples = Examples({"x": x}, {"x": {0: "batch"}}, keywords=False, calibration=({"x": x},))
    free = Recipe.of("nearest:int8/int8-static").for_cpu("vnni")
    return tersor.compress(Overflowing().eval(), free, Calibration(examples)).model, examples


def test_weights_that_overflow_are_scaled_and_rounded_again(tmp_path):
    model, examples = overflowing(tmp_path)
    before = examples.run(model)["output"]
    checkpoint, (note,) = for_any_processor(checkpoint_of(tmp_path, model, examples))
    assert note.startswith("the int8 weights of conv and 2 more sites overflow on processors without VNNI")
    for packed in checkpoint.sites:
        assert keeps_pair_rule(packed.encoded.parts["codes"], packed.site.neighbours(model))
    change = (examples.run(model)["output"] - before).norm() / before.norm()
    assert 0 < change < 0.01
    assert f"by {change:.2%} " in note
    assert for_any_processor(checkpoint) == (checkpoint, ())


def test_what_was_left_free_stays_as_it_is_where_that_is_said(tmp_path):
    model, examples = overflowing(tmp_path)
    codes = packed_sites(model)[0][1].encoded.parts["codes"]
    Onnx(cpu="vnni").write(checkpoint_of(tmp_path, model, examples), tmp_path / "out.onnx", tmp_path)
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert np.array_equal(held["conv.codes"], codes.view(4, 3, 3, 3).numpy())


def test_an_unknown_cpu_is_refused(tmp_path):
    model, examples = overflowing(tmp_path)
    with pytest.raises(InputError, match="--cpu amx is not one of any, vnni"):
        Onnx(cpu="amx").check(checkpoint_of(tmp_path, model, examples))


@pytest.mark.parametrize("name", ["linear", "two of one size"])
def test_files_open_where_weights_are_made_unsigned(name, tmp_path):
    """ONNX Runtime's own way to exact products, on processors without VNNI instructions."""
    model, examples = packed("linear", "int8/int8-static") if name == "linear" else overflowing(tmp_path)
    file, _ = write(model, examples, tmp_path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {name: tensor.numpy() for name, tensor in examples.inputs.items()}
    (found,) = session.run(None, inputs)
    assert np.array_equal(found, next(iter(run(file, examples).values())))
