"""Patterns that runtimes make slow kernels of, or none, written as those they have fast kernels for."""

import onnx_ir as ir
import torch

from tersor.exporters.onnx.builder import TYPES
from tersor.exporters.onnx.convolutions import clamped, constant, moves


def sums_before_norms(model: ir.Model) -> None:
    """Residual sums that a LayerNormalization reads become `Sum`, which is the same.

    ONNX Runtime fuses `Add` and the norm to SkipLayerNormalization, whose kernel for the CPU works value by value: 55
    microseconds for 32 x 384 numbers (1.31), where both apart take 14.
    """
    for norm in model.graph:
        added = norm.inputs[0].producer() if norm.op_type == "LayerNormalization" and norm.inputs[0] else None
        if added is not None and added.op_type == "Add" and added.outputs[0].dtype == TYPES[torch.float32]:
            as_sum(added)


def biases_of_float_results(model: ir.Model) -> None:
    """Biases of int8 products of matrices become `Sum`, unless the result is quantized.

    ONNX Runtime makes one Gemm of the product and an `Add`. Where its result is float, it has no int8 kernel for that
    (1.31), and decodes the weight at every run.
    """
    for node in model.graph:
        if node.op_type != "MatMul" or not all(value is not None and is_dequantized(value) for value in node.inputs):
            continue
        uses = list(node.outputs[0].uses())
        shape = uses[0].node.outputs[0].shape if len(uses) == 1 and uses[0].node.op_type == "Add" else None
        if shape is not None and len(shape) == 2:
            result = clamped(uses[0].node.outputs[0])
            readers = {use.node.op_type for use in result.uses()}
            if result.is_graph_output() or readers != {"QuantizeLinear"}:
                as_sum(uses[0].node)


def is_dequantized(value: ir.Value) -> bool:
    """True if a value comes from codes."""
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def as_sum(added: ir.Node) -> None:
    """The same operator under its other name, which runtimes do not look for."""
    added.op_type = "Sum"
    added.name = (added.name or "").removesuffix("Add") + "Sum"


def pads_into_convolutions(model: ir.Model) -> None:
    """Zeros around an image that only a convolution reads, perhaps behind its quantizer, become its own padding."""
    for conv in list(model.graph):
        if conv.op_type != "Conv" or conv.inputs[0] is None:
            continue
        path = [conv.inputs[0]]  # from the convolution back to the padding
        while (before := path[-1].producer()) is not None and before.op_type in ("DequantizeLinear", "QuantizeLinear"):
            assert before.inputs[0] is not None
            path.append(before.inputs[0])
        pad = path[-1].producer()
        if pad is None or pad.op_type != "Pad" or any(len(list(value.uses())) > 1 for value in path):
            continue
        around = amounts(pad)
        mode = conv.attributes["auto_pad"].as_string() if "auto_pad" in conv.attributes else "NOTSET"
        if around is None or mode != "NOTSET":
            continue
        own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * len(around)
        whole = [one + other for one, other in zip(own, around, strict=True)]
        conv.attributes["pads"] = ir.AttrInt64s("pads", whole)
        assert pad.inputs[0] is not None
        (first,) = path[-1].uses()
        first.node.replace_input_with(first.idx, pad.inputs[0])
        for value in path[:-1]:  # smaller now
            value.shape = None
        model.graph.remove(pad, safe=True)


def amounts(pad: ir.Node) -> list[int] | None:
    """The zeros that are added before and after each axis of an image `[row, channel, ...]`, as a convolution notes
    them; None where something else than zeros is added, or elsewhere."""
    if not moves(pad) or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    if pad.inputs[1] is None or pad.inputs[1].const_value is None:
        return None
    counts = constant(pad.inputs[1]).tolist()
    half = len(counts) // 2
    before, after = counts[:half], counts[half:]
    if any(before[:2] + after[:2]) or min(counts) < 0:
        return None
    return [*before[2:], *after[2:]]
