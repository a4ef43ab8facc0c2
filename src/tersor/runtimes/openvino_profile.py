"""OpenVINO's own profile: the time of every node it executed, and what its compiled graph says of each.

A node stands for several of the file's operators that were fused; their operations are counted in the file's graph at
the shapes that ran.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from tersor.runtimes.contract import LayerTime, Profile

PRODUCTS = {
    "FullyConnected",
    "MatMul",
    "Convolution",
    "Deconvolution",
    "RNNSeq",
    "RNNCell",
    "ScaledDotProductAttention",
}
QUANTIZERS = {"FakeQuantize", "Convert"}
FLOATS, PACKED = {"f32", "f16", "bf16"}, {"u8", "i8", "u4", "i4", "u2"}
PRECISIONS = {"f32": "fp32", "f16": "fp16", "u8": "int8", "i8": "int8"}


def averages(
    before: Sequence[Any], num_before: int, after: Sequence[Any], num_after: int, busy: float
) -> dict[str, float]:
    """Seconds per run of every executed node between two readings of the counters, which hold averages since the start:
    in whole microseconds, so that a node may come out wrong by about one. `busy` is the share of that time in which the
    process ran, and did not wait for other work of the machine.
    """
    first = {info.node_name: info.real_time.total_seconds() * num_before for info in before}
    found = {}
    for info in after:
        if str(info.status).endswith(".EXECUTED"):
            spent = info.real_time.total_seconds() * num_after - first.get(info.node_name, 0.0)
            found[info.node_name] = max(0.0, busy * spent / (num_after - num_before))
    return found


def read_profile(times: dict[str, float], seconds: float, compiled: Any, at_shapes: Any) -> Profile:
    """The layers in the order of execution.

    Args:
        times: seconds of each executed node.
        seconds: time of a whole run.
        compiled: the CompiledModel that ran.
        at_shapes: the file's Model at the shapes that ran.
    """
    macs = {op.get_friendly_name(): macs_of(op) for op in at_shapes.get_ordered_ops()}
    nodes = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    dynamic = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) > 0
    layers = [layer(name, spent, nodes[name], macs, dynamic) for name, spent in times.items() if name in nodes]
    return Profile(tuple(layers), seconds, len(layers))


def layer(name: str, seconds: float, node: Any, macs: dict[str, int], dynamic: bool) -> LayerTime:
    """One executed node; `dynamic` is whether inputs of packed weights are quantized."""
    about = {key: value.astype(str) for key, value in node.get_rt_info().items()}
    kind, kernel = about["layerType"], about["primitiveType"]
    fused = [each for each in about["originalLayersNames"].split(",") if each]
    num_macs = sum(macs.get(each, 0) for each in fused) or (macs_at_ports(node) if kind == "FullyConnected" else 0)
    ports = [*node.inputs(), *node.outputs()]
    precision = PRECISIONS.get(about["runtimePrecision"], about["runtimePrecision"])
    part = part_of(kind, num_macs, about)
    weights = weights_of(node) if part == "product" else ""
    if weights in PACKED and kernel.endswith("f32"):  # inputs are quantized inside, or weights made float
        precision = "int8" if dynamic else "fp32"
    return LayerTime(
        name=name,
        kind=kind,
        part=part,
        seconds=seconds,
        kernel=kernel,
        precision=precision if part == "product" else "",
        weights="" if not weights else "float" if weights in FLOATS else "packed",
        macs=num_macs,
        num_bytes=sum(port_bytes(port) for port in ports),
    )


def part_of(kind: str, num_macs: int, about: dict[str, str]) -> str:
    """The purpose of a node; a fused subgraph with products in it is a product."""
    if kind in PRODUCTS or num_macs:
        return "product"
    small = {"u8", "i8"} & {about["runtimePrecision"], *about["outputPrecisions"].split(",")}
    if kind in QUANTIZERS and small:
        return "quantize"
    if kind in ("Reorder", "Eltwise", "Subgraph") and small:
        return "quantize"
    return "other"


def weights_of(node: Any) -> str:
    """The type of a product's weights: the largest of its inputs that come from nothing but constants."""
    found = []
    for port in node.inputs():
        shape, leaves = port.get_partial_shape(), leaves_of(port.get_source_output().get_node())
        if shape.is_static and len(shape) > 1 and all(kind == "Const" for _, kind, _ in leaves):
            found.append((prod(shape.to_shape()), max(leaves)[2]))
    return max(found)[1] if found else ""


def leaves_of(node: Any) -> list[tuple[int, str, str]]:
    """The nodes without inputs that a node comes from: how many values, the kind, the precision."""
    todo, seen, leaves = [node], set[str](), []
    while todo:
        each = todo.pop()
        if each.get_friendly_name() in seen:
            continue
        seen.add(each.get_friendly_name())
        todo += [port.get_source_output().get_node() for port in each.inputs()]
        if not each.inputs():
            about, shape = each.get_rt_info(), each.output(0).get_partial_shape()
            size = prod(shape.to_shape()) if shape.is_static else 0
            leaves.append((size, about["layerType"].astype(str), about["outputPrecisions"].astype(str)))
    return leaves


def port_bytes(port: Any) -> int:
    """Bytes that pass through a port, at the shape that ran."""
    shape, kind = port.get_partial_shape(), port.get_element_type()
    if shape.is_dynamic or kind.is_dynamic():
        return 0
    return prod(shape.to_shape()) * kind.bitwidth // 8


def macs_at_ports(node: Any) -> int:
    """Multiply-accumulates of a product that the file names differently: its output times the input's last axis."""
    first, out = node.input(0).get_partial_shape(), node.output(0).get_partial_shape()
    return 0 if first.is_dynamic or out.is_dynamic else prod(out.to_shape()) * first.to_shape()[-1]


def macs_of(op: Any) -> int:
    """Multiply-accumulates of one operator of a model whose shapes are all known; 0 for element-wise work."""
    kind = op.get_type_name()
    if not any(kind.startswith(each) for each in ("MatMul", "Convolution", "GroupConvolution", "ScaledDot", "LSTM")):
        return 0
    shapes = [port.get_partial_shape() for port in (*op.inputs(), op.output(0))]
    if any(shape.is_dynamic for shape in shapes):
        return 0
    *inputs, out = [tuple(shape.to_shape()) for shape in shapes]
    if kind == "MatMul":
        inner = inputs[0][-2] if op.get_attributes()["transpose_a"] and len(inputs[0]) > 1 else inputs[0][-1]
        return prod(out) * inner
    if "Convolution" in kind:
        return out[0] * prod(out[2:]) * prod(inputs[1])
    if kind.startswith("ScaledDot"):
        return prod(out[:-1]) * inputs[1][-2] * (out[-1] + inputs[0][-1])
    batch, length = inputs[0][0], inputs[0][1] if kind == "LSTMSequence" else 1
    return batch * length * sum(prod(shape) for shape in inputs if len(shape) == 3 and shape[1] % 4 == 0)
