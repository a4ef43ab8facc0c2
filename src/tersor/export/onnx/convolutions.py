"""Int8 convolutions as ONNX Runtime has kernels for them.

Its kernel takes int8 and gives int8, with the bias inside; batch norms are in the way, and so is a float result. Batch
norms become a factor of the weight's scales, and a bias. A result that goes into a quantizer, perhaps through a ReLU,
is int8 as it is. One that goes elsewhere (into a sum, as at the end of a residual block) is rounded to int8 as well:
with the scale of a quantizer that reads it too, or else with one for the range it has on calibration data. That is the
one rounding that the artifact does not have; without calibration data, or with --float-outputs, it is left out, and
these convolutions run in float.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tersor.activations import IntStatic
from tersor.export.examples import Examples
from tersor.export.onnx.builder import Builder
from tersor.export.onnx.file import save
from tersor.runtimes import runtime_named
from tersor.stats import Stats

Ranges = Mapping[str, tuple[float, int]]  # value -> scale and unsigned zero point
SAMPLE = 2**16  # values of a result that its range is chosen by


def fold_norms(model: ir.Model) -> None:
    """Batch norms that alone read an int8 convolution go into its scales and bias."""
    graph = model.graph
    for norm in list(graph):
        read = norm.inputs[0] if norm.op_type == "BatchNormalization" else None
        conv: Any = read.producer() if read is not None else None
        if conv is None or not is_int8(conv) or len(list(conv.outputs[0].uses())) > 1:
            continue
        if any(value is None or value.const_value is None for value in norm.inputs[1:5]):
            continue
        gain, offset, mean, var = (constant(value) for value in norm.inputs[1:5])
        eps = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        factor = gain.astype(np.float64) / np.sqrt(var.astype(np.float64) + eps)
        if not (factor > 0).all():  # a scale cannot be negative
            continue
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else 0.0
        weight = conv.inputs[1].producer()
        b = Builder(graph, torch.float32).at(conv)
        name = conv.outputs[0].name
        scale = b.constant(f"{name}.folded_scale", (constant(weight.inputs[1]) * factor).astype(np.float32))
        scaled = b.node("DequantizeLinear", weight.inputs[0], scale, axis=0)
        shift = b.constant(f"{name}.folded_bias", (offset + (bias - mean) * factor).astype(np.float32))
        folded = b.node("Conv", conv.inputs[0], scaled, shift, **settings(conv))
        old = norm.outputs[0]
        folded.type, folded.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, folded, replace_graph_outputs=True)
        graph.remove([norm, conv], safe=True)


def float_results(model: ir.Model) -> list[ir.Value]:
    """Results of int8 convolutions, after a ReLU, that no quantizer reads, though something does."""
    return [value for value in results(model) if not quantizers(value) and list(value.uses())]


def quantize_outputs(model: ir.Model, ranges: Ranges) -> int:
    """Round the float results of int8 convolutions to int8; how many of them have no such rounding in the artifact."""
    graph, num_rounded = model.graph, 0
    for value in results(model):
        readers = quantizers(value)
        others = [use.node for use in value.uses() if use.node.op_type != "QuantizeLinear"]
        if not others or not (readers or value.name in ranges):
            continue
        num_rounded += 1
        place = value.producer()
        assert place is not None
        if readers:
            codes, scale, zero = readers[0].outputs[0], readers[0].inputs[1], readers[0].inputs[2]
            back = ir.node("DequantizeLinear", [codes, scale, zero])
            graph.insert_after(readers[0], back)
        else:
            b = Builder(graph, torch.float32)
            step, zero_point = ranges[value.name or ""]
            scale = b.constant(f"{value.name}.output_scale", np.array(step, dtype=np.float32))
            zero = b.constant(f"{value.name}.output_zero_point", np.array(zero_point, dtype=np.uint8))
            quantize = ir.node("QuantizeLinear", [value, scale, zero])
            quantize.outputs[0].name = f"{value.name}.codes"
            back = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
            graph.insert_after(place, [quantize, back])
        back.outputs[0].name = f"{value.name}.rounded"
        for node in others:
            for i, read in enumerate(node.inputs):
                if read is value:
                    node.replace_input_with(i, back.outputs[0])
    graph.sort()
    return num_rounded


def measured(model: ir.Model, examples: Examples, scratch: Path) -> Ranges:
    """The ranges of all float results of int8 convolutions over the calibration inputs."""
    values = float_results(model)
    if not values or not examples.calibration:
        return {}
    watched = model.clone()
    names = [value.name for value in values]
    made = {output.name: output for node in watched.graph for output in node.outputs}
    watched.graph.outputs.extend(made[name] for name in names)
    save(watched, scratch / "watched.onnx")
    session = runtime_named("onnx").open(scratch / "watched.onnx")
    runs = [session.run({n: t.numpy() for n, t in inputs.items()}) for inputs in examples.calibration]
    return ranges_of({str(name): [run[str(name)] for run in runs] for name in names})


def ranges_of(samples: Mapping[str, Iterable[np.ndarray]]) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each value, as int8-static inputs get theirs."""
    found = {}
    for name, arrays in samples.items():
        values = torch.cat([torch.from_numpy(array).flatten() for array in arrays])
        sample = values[:: max(1, len(values) // SAMPLE)].view(-1, 1)
        largest = values.abs().max().view(1)
        params = IntStatic(8).fit(Stats(sample=sample, largest=largest))
        found[name] = float(params["scale"]), int(params["zero_point"]) + 128
    return found


def results(model: ir.Model) -> list[ir.Value]:
    """What every int8 convolution gives, after the ReLU or clamp that alone reads it."""
    found = []
    for conv in model.graph:
        if not is_int8(conv):
            continue
        value = conv.outputs[0]
        uses = list(value.uses())
        if len(uses) == 1 and uses[0].node.op_type in ("Relu", "Clip"):
            value = uses[0].node.outputs[0]
        if not value.is_graph_output():
            found.append(value)
    return found


def quantizers(value: ir.Value) -> list[ir.Node]:
    """The quantizers that read a value."""
    return [use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"]


def is_int8(node: ir.Node) -> bool:
    """Whether a node is a convolution of a quantized input and a quantized weight."""
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return node.op_type == "Conv" and all(p is not None and p.op_type == "DequantizeLinear" for p in producers)


def settings(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node, for another one."""
    return dict(node.attributes)


def constant(value: ir.Value | None) -> np.ndarray:
    """The numbers that an initializer holds."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
