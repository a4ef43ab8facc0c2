"""Int8 convolutions as ONNX Runtime has kernels for them, and what lies between them.

Its kernel takes int8 and gives int8, with the bias inside; batch norms are in the way, and so is a float result. Batch
norms become a factor of the weight's scales, and a bias. A result that goes into a quantizer, perhaps through a ReLU,
is int8 as it is. One that goes elsewhere (into a sum, as at the end of a residual block) is rounded to int8 as well:
with the scale of a quantizer that reads it too, or else with one for the range it has on calibration data.

Sums, concatenations and average pools of nothing but such results have int8 kernels as well (`JOINS`), so they read
codes and their results are rounded in the same way: the whole residual stream is int8. What only moves values
(`MOVERS`), as a shortcut that drops pixels and adds channels does, moves codes instead.

These are the roundings that the artifact does not have; without calibration data, or with --float-outputs, they are
left out, and these convolutions run in float.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tersor.activations.observers.min_max import MinMax
from tersor.activations.quantizers import IntStatic
from tersor.exporters.examples import Examples
from tersor.exporters.onnx.builder import Builder
from tersor.exporters.onnx.file import save
from tersor.exporters.onnx.names import name_in, path_of
from tersor.methods.stats import Stats
from tersor.runtimes import runtime_named

Ranges = Mapping[str, tuple[float, int]]  # value -> scale and unsigned zero point
CODES = 255  # the largest
JOINS = ("Add", "Concat", "AveragePool", "GlobalAveragePool")  # have int8 kernels
MOVERS = ("Slice", "Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool")  # take codes as well


def fold_norms(model: ir.Model) -> None:
    """Fold a batch norm that is the only reader of an int8 convolution into its scales and bias."""
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
        scaled = b.node("DequantizeLinear", weight.inputs[0], scale, *weight.inputs[2:], axis=0)
        shift = b.constant(f"{name}.folded_bias", (offset + (bias - mean) * factor).astype(np.float32))
        folded = b.node("Conv", conv.inputs[0], scaled, shift, **settings(conv))
        old = norm.outputs[0]
        folded.type, folded.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, folded, replace_graph_outputs=True)
        graph.remove([norm, conv], safe=True)


def drop_clamps(model: ir.Model) -> None:
    """Remove each ReLU or clamp whose only reader is a quantizer that saturates at the same codes."""
    for clamp in list(model.graph):
        uses = list(clamp.outputs[0].uses()) if clamp.op_type in ("Relu", "Clip") else []
        if len(uses) != 1 or uses[0].node.op_type != "QuantizeLinear" or clamp.outputs[0].is_graph_output():
            continue
        bounds = [0.0, np.inf] if clamp.op_type == "Relu" else [bound(value) for value in clamp.inputs[1:3]]
        step, zero = (constant(value).astype(np.float64) for value in uses[0].node.inputs[1:3])
        lowest, highest = np.rint(np.array(bounds) / step) + zero
        if lowest <= 0 and highest >= CODES and clamp.inputs[0] is not None:
            uses[0].node.replace_input_with(0, clamp.inputs[0])
            model.graph.remove(clamp, safe=True)


def bound(value: ir.Value | None) -> float:
    """One end of a clamp; not a number where only the running model knows it."""
    return float(constant(value)) if value is not None and value.const_value is not None else np.nan


def float_results(model: ir.Model) -> list[ir.Value]:
    """Results of int8 convolutions, and of their sums and pools, that no quantizer reads, though something does."""
    return [value for value in results(model) if not quantizers(value) and list(value.uses())]


def float_convolutions(model: ir.Model) -> int:
    """The number of int8 convolutions that give floats where codes would do."""
    values = [clamped(node.outputs[0]) for node in model.graph if is_int8(node)]
    given = [value for value in values if list(value.uses()) and not value.is_graph_output()]
    return sum(all(use.node.op_type != "QuantizeLinear" for use in value.uses()) for value in given)


def quantize_outputs(model: ir.Model, ranges: Ranges) -> int:
    """Pass codes from one int8 kernel to the next. Returns how many values the artifact itself does not round."""
    graph, num_rounded = model.graph, 0
    for value in results(model, ranges):
        if all(use.node.op_type == "QuantizeLinear" for use in value.uses()):
            continue
        num_rounded += 1
        b = Builder(graph, torch.float32)
        readers = quantizers(value)
        if readers:
            scale, zero = readers[0].inputs[1:3]
        else:
            step, zero_point = ranges[value.name or ""]
            scale = b.constant(f"{value.name}.output_scale", np.array(step, dtype=np.float32))
            zero = b.constant(f"{value.name}.output_zero_point", np.array(zero_point, dtype=np.uint8))
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name=beside(value, "QuantizeLinear"))
        quantize.outputs[0].name = f"{value.name}.codes"
        graph.append(quantize)
        read_codes(graph, value, quantize.outputs[0], quantize)
    graph.sort()
    drop_clamps(model)
    slices_as_pools(model)
    return num_rounded


def read_codes(graph: ir.Graph, value: ir.Value, codes: ir.Value, quantize: ir.Node) -> None:
    """Let all readers of a value read its codes: quantizers of the same scale end, what moves values moves codes."""
    scale, zero = quantize.inputs[1:3]
    back: ir.Value | None = None
    for use in list(value.uses()):
        node = use.node
        if node.op_type == "QuantizeLinear":
            if node is not quantize and list(node.inputs[1:3]) == [scale, zero]:
                ir.convenience.replace_all_uses_with(node.outputs[0], codes)
                graph.remove(node, safe=True)
        elif use.idx == 0 and moves(node):
            inputs = [codes, *node.inputs[1:]]
            if node.op_type == "Pad":
                inputs = [codes, node.inputs[1], zero, *node.inputs[3:]]
            moved = ir.node(node.op_type, inputs, settings(node), name=node.name)
            moved.outputs[0].name = f"{node.outputs[0].name}.codes"
            moved.outputs[0].type, moved.outputs[0].shape = ir.TensorType(ir.DataType.UINT8), node.outputs[0].shape
            graph.append(moved)
            read_codes(graph, node.outputs[0], moved.outputs[0], quantize)
            graph.remove(node, safe=True)
        else:
            if back is None:
                dequantize = ir.node("DequantizeLinear", [codes, scale, zero], name=beside(value, "DequantizeLinear"))
                dequantize.outputs[0].name = f"{value.name}.rounded"
                graph.append(dequantize)
                back = dequantize.outputs[0]
            node.replace_input_with(use.idx, back)


def slices_as_pools(model: ir.Model) -> None:
    """Every n-th row and column of images in codes, as the shortcut of a ResNet takes them, by pools of one pixel.

    They give the same codes and have a kernel for int8, where strided slices copy value by value.
    """
    for node in list(model.graph):
        if node.op_type != "Slice" or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.UINT8:
            continue
        strides = pixel_strides(node)
        if strides is None:
            continue
        read, before = node.inputs[0], node.inputs[0].producer()
        if before is not None and before.op_type == "MaxPool" and before.attributes["kernel_shape"].value == (1, 1):
            strides = [mine * other for mine, other in zip(strides, before.attributes["strides"].value, strict=True)]
            assert before.inputs[0] is not None
            read = before.inputs[0]
        pool = ir.node(
            "MaxPool", [read], {"kernel_shape": [1, 1], "strides": strides}, name=beside(node.outputs[0], "MaxPool")
        )
        old, made = node.outputs[0], pool.outputs[0]
        made.name, made.type, made.shape = f"{old.name}.pixels", old.type, old.shape
        model.graph.insert_before(node, pool)
        ir.convenience.replace_all_uses_with(old, made)
        model.graph.remove(node, safe=True)


def pixel_strides(slices: ir.Node) -> list[int] | None:
    """`[row, column]` strides of a slice over whole images `[row, channel, y, x]`; None for any other slice."""
    shape, givens = slices.outputs[0].shape, slices.inputs[1:5]
    if shape is None or len(shape) != 4 or len(givens) < 4:
        return None
    if any(value is None or value.const_value is None for value in givens):
        return None
    starts, ends, axes, steps = (constant(value).flatten().tolist() for value in givens)
    whole = not any(starts) and min(ends) >= 2**31 - 1 and min(steps) > 0
    strides = dict(zip(axes, steps, strict=True))
    return [strides.get(2, 1), strides.get(3, 1)] if whole and set(axes) <= {2, 3} else None


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
    """Scale and unsigned zero point of each value, for everything from its smallest to its largest number."""
    found = {}
    for name, arrays in samples.items():
        ends = torch.tensor([[float(array.min()), float(array.max())] for array in arrays])
        params = IntStatic(8).fit(Stats(ranges=ends), MinMax())
        found[name] = float(params["scale"]), int(params["zero_point"]) + 128
    return found


def results(model: ir.Model, ranges: Ranges | None = None) -> list[ir.Value]:
    """Results of int8 convolutions, after the ReLU or clamp that is their only reader, and joins of such results.

    With `ranges`, only results that have a scale: from their range, or from a quantizer that reads them.
    """
    found: list[ir.Value] = []
    whole: set[ir.Value] = set()  # these, and what is moved of them
    for node in model.graph:
        if moves(node) and node.inputs[0] in whole:
            whole.add(node.outputs[0])
        elif is_int8(node) or (node.op_type in JOINS and all(read in whole for read in node.inputs)):
            value = clamped(node.outputs[0])
            has_scale = ranges is None or value.name in ranges or bool(quantizers(value))
            if has_scale and not value.is_graph_output():
                found.append(value)
                whole.add(value)
    return found


def clamped(value: ir.Value) -> ir.Value:
    """A value after the ReLU or clamp that alone reads it."""
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0].node.op_type in ("Relu", "Clip")
    return uses[0].node.outputs[0] if alone else value


def quantizers(value: ir.Value) -> list[ir.Node]:
    """The quantizers that read a value, directly or after it was only moved."""
    found = [use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"]
    moved = [use.node.outputs[0] for use in value.uses() if use.idx == 0 and moves(use.node)]
    return found + [quantizer for each in moved for quantizer in quantizers(each)]


def moves(node: ir.Node) -> bool:
    """True if a node only moves values and adds zeros."""
    if node.op_type != "Pad":
        return node.op_type in MOVERS and len(node.outputs) == 1
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    is_zero = fill is None or (fill.const_value is not None and not constant(fill).any())
    return mode == "constant" and is_zero


def is_int8(node: ir.Node) -> bool:
    """True if a node is a convolution of a quantized input and a quantized weight."""
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return node.op_type == "Conv" and all(p is not None and p.op_type == "DequantizeLinear" for p in producers)


def beside(value: ir.Value, kind: str) -> str:
    """The name of an operator in the layer that makes a value."""
    return name_in(path_of(value.producer()), kind)


def settings(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node, as arguments for making another."""
    return dict(node.attributes)


def constant(value: ir.Value | None) -> np.ndarray:
    """The numbers that an initializer holds."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
