"""ONNX Runtime's own profile, and what its optimized graph says of every node that the profile names.

The profile holds a start and a length in whole microseconds for every node, with the shapes that ran; weights that
were packed beforehand are missing there, so their shapes come from the optimized graph, which is written beside it.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from tersor.core.errors import MissingExtra
from tersor.runtimes.contract import LayerTime, Profile

# Operators by what they do; ONNX's own, and com.microsoft's that the optimizer puts in their place.
MATMULS = {
    *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "TransposeMatMul"),
    *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulInteger16"),
    *("MatMulNBits", "MatMulFpQ4", "MatMulBnb4"),
}
CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv", "NhwcConv", "ConvTranspose"}
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
ATTENTION = {"Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention"}
QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
DECODERS = {"GatherBlockQuantized", "DequantizeBFP", "DequantizeBnb4"}
INTEGERS = {"uint8", "int8", "uint4", "int4"}


@dataclass(frozen=True)
class Node:
    """A node of the optimized graph.

    Attributes:
        weights: initializers by input position: type and shape.
        attributes: those that are numbers.
    """

    op: str
    weights: dict[int, tuple[str, tuple[int, ...]]]
    attributes: dict[str, int]


def read_profile(events: list[dict[str, Any]], graph: dict[str, Node], walls: list[float], num_warm: int) -> Profile:
    """The medians over the runs after the first `num_warm`; layers in the order they ran.

    Args:
        events: the events that the profiler wrote.
        graph: nodes of the optimized graph by name.
        walls: seconds of each run.
    """
    spans: dict[str, list[int]] = defaultdict(list)
    last: dict[str, dict[str, Any]] = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            spans[name].append(event["dur"])
            last[name] = event["args"]
    num_runs = len(walls)
    layers = []
    for name, arguments in last.items():
        each = len(spans[name]) // num_runs  # more than one inside a loop
        runs = [sum(spans[name][run * each : (run + 1) * each]) for run in range(num_warm, num_runs)]
        layers.append(layer(name, median(runs) * 1e-6, arguments, graph.get(name)))
    return Profile(tuple(layers), median(walls[num_warm:]), len(layers))


def layer(name: str, seconds: float, arguments: dict[str, Any], node: Node | None) -> LayerTime:
    """One node: its time, and from its shapes the operations and the bytes."""
    op = arguments["op_name"]
    inputs = [next(iter(each.items())) for each in arguments["input_type_shape"]]
    outputs = [next(iter(each.items())) for each in arguments["output_type_shape"]]
    weights = node.weights if node is not None else {}
    weight_bytes = sum(prod(shape) * WIDTHS.get(kind, 4) for kind, shape in weights.values())
    moved = int(arguments["activation_size"]) + int(arguments["output_size"])
    part = part_of(op, inputs, weights)
    return LayerTime(
        name=name,
        kind=op,
        part=part,
        seconds=seconds,
        kernel=kernel_of(op, inputs, weights) if part == "product" else op,
        precision=precision_of(op, inputs, node) if part == "product" else "",
        weights=stored_as(weights) if part == "product" else "",
        macs=macs_of(op, inputs, outputs, node),
        num_bytes=moved + int(weight_bytes),
    )


WIDTHS = {"float": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int4": 0.5, "uint4": 0.5, "int64": 8}
Shaped = tuple[str, list[int]]  # type and shape


def part_of(op: str, inputs: list[Shaped], weights: dict[int, tuple[str, tuple[int, ...]]]) -> str:
    """The purpose of a node, such as a product, decoding or the rest."""
    if op in MATMULS | CONVOLUTIONS | RECURRENT | ATTENTION:
        return "product"
    if op in DECODERS or (op == "DequantizeLinear" and 0 in weights):
        return "decode"
    if op in QUANTIZERS or (op == "Cast" and inputs and inputs[0][0] in ("int32", "int8", "uint8")):
        return "quantize"
    return "other"


def kernel_of(op: str, inputs: list[Shaped], weights: dict[int, tuple[str, tuple[int, ...]]]) -> str:
    """A product's operator, and for integers the types that meet: signed inputs are the slow case."""
    kinds = [kind for kind, shape in inputs if shape][:1] + [
        kind for kind, shape in weights.values() if prod(shape) > 1
    ]
    return f"{op} {' x '.join(kinds[:2])}" if INTEGERS & set(kinds) else op


def stored_as(weights: dict[int, tuple[str, tuple[int, ...]]]) -> str:
    """The type that a product's largest weight is stored in; empty if it has none (biases and scales do not count)."""
    matrices = [(prod(shape), kind) for kind, shape in weights.values() if len(shape) > 1]
    return "" if not matrices else "packed" if max(matrices)[1] in INTEGERS else "float"


def precision_of(op: str, inputs: list[Shaped], node: Node | None) -> str:
    """The types that a product multiplies."""
    if op == "MatMulNBits":
        return "int8" if node is not None and node.attributes.get("accuracy_level") == 4 else "fp32"
    if "Integer" in op or op.startswith(("QLinear", "QGemm", "DynamicQuantize", "QAttention")):
        return "int8"
    kinds = {kind for kind, _ in inputs}
    return "fp16" if "float16" in kinds else "bf16" if "bfloat16" in kinds else "fp32"


def macs_of(op: str, inputs: list[Shaped], outputs: list[Shaped], node: Node | None) -> int:
    """Multiply-accumulates, from the shapes that ran and those of the weights; 0 where they do not tell."""
    weights = node.weights if node is not None else {}
    largest = max((shape for _, shape in weights.values()), key=prod, default=())
    if not inputs or not outputs:
        return 0
    first, out = inputs[0][1], outputs[0][1]
    if op in MATMULS:
        transposed = node is not None and node.attributes.get("transA")
        return prod(out) * first[-2 if transposed else -1] if len(first) > 1 else prod(out) * prod(first)
    if op in CONVOLUTIONS and largest:
        channel = -1 if op.startswith("Nhwc") else 1
        positions = prod(first if op == "ConvTranspose" else out) // (first if op == "ConvTranspose" else out)[channel]
        return positions * prod(largest)
    if op in RECURRENT:
        gates = sum(prod(shape) for _, shape in weights.values() if len(shape) == 3)
        return first[0] * first[1] * gates
    if op in ATTENTION:
        batch, length = first[:2]
        return batch * length * prod(largest) + 2 * batch * length * length * out[-1]
    return 0


def read_graph(path: Path) -> dict[str, Node]:
    """The nodes of an ONNX file by name, with the types and shapes of their weights; no weight is read."""
    try:
        import onnx
    except ImportError:
        raise MissingExtra("onnx", "profiling ONNX files") from None
    graph = onnx.load(str(path), load_external_data=False).graph
    kinds = {value: name.lower() for name, value in onnx.TensorProto.DataType.items()}
    shapes = {each.name: (kinds[each.data_type], tuple(each.dims)) for each in graph.initializer}
    for node in graph.node:  # weights that are made float at every run are weights all the same
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return {
        node.name: Node(
            node.op_type,
            {i: shapes[name] for i, name in enumerate(node.input) if name in shapes},
            {each.name: each.i for each in node.attribute if each.type == onnx.AttributeProto.INT},
        )
        for node in graph.node
    }
