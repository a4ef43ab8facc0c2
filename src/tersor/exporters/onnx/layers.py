"""Our nodes of a traced graph, written out with the codes and scales of their sites.

`ROWS` says which operators each kind of site becomes; the first that fits is taken.

    static      QuantizeLinear and DequantizeLinear around a float product ("QDQ"), which runtimes fuse to int8 kernels.
                Codes of inputs are unsigned there (ours + 128), which x86 multiplies twice as fast; weights are signed.
    dynamic     DynamicQuantizeLinear and MatMulInteger. One scale serves the whole input, where ours has one per token.
    per token   the same product on inputs quantized exactly as ours are, by ordinary operators.
    weight only com.microsoft::MatMulNBits, whose kernels quantize inputs to int8 in blocks (accuracy_level 4)
    decoded     from the codes, when the file is loaded: 16-bit floats, convolutions, LSTM, attention, stacked experts
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tersor.exporters.contract import PackedSite
from tersor.exporters.onnx.blocks import DOMAIN
from tersor.exporters.onnx.builder import MICROSOFT, Builder
from tersor.exporters.onnx.codes import (
    HELD_BITS,
    block_size,
    blocks,
    decoded_rows,
    grid,
    is_shared,
    unfolded,
    zero_points,
)
from tersor.exporters.onnx.language import Parts, Tables, keep_rows, lower_blocks
from tersor.formats.packing import pack


@dataclass(frozen=True)
class Lowering:
    """Settings of the whole graph.

    Attributes:
        dtype: type of all computations that are not integer.
        per_token: int8-dynamic inputs get a scale per token, as in the artifact, and not one for all of them.
        accuracy_level: accuracy level of MatMulNBits: 4 quantizes inputs to int8 in blocks, 0 leaves them float.
        decoded: sites written as their decoded weights.
        rounds_inputs: True if the runtime itself rounds the float inputs of int8 weights to int8, as OpenVINO does;
            such sites are written as dequantized weights and float products, and nothing says so in the file.
        keep_blocks: leave the blocks of language models (blocks.py) as nodes of ours.
    """

    dtype: torch.dtype = torch.float32
    per_token: bool = False
    accuracy_level: int = 4
    decoded: frozenset[str] = frozenset()
    rounds_inputs: bool = False
    keep_blocks: bool = False


def lower(traced: ir.Model, sites: Mapping[str, PackedSite], choice: Lowering, tables: Tables = None) -> ir.Model:
    """A copy of the traced model with every node of ours replaced. It shares the tensors of the traced one."""
    model = traced.clone()
    graph = model.graph
    builder = Builder(graph, choice.dtype)
    for node in graph:
        if node.domain == DOMAIN and node.op_type == "Attention":
            keep_rows(node.outputs[0])
    parts = Parts(dict(sites), tables, choice.decoded)
    if not choice.keep_blocks:
        lower_blocks(graph, builder, parts)
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type not in EMIT:
            continue
        packed = parts.sites[node.attributes["site"].as_string()]
        builder.at(node, packed.site.name)
        made = EMIT[node.op_type](builder, node, packed, choice)
        old = node.outputs[0]
        if any(made is each for each in node.inputs):  # nothing to compute
            ir.convenience.replace_all_uses_with(old, made)
            graph.remove(node, safe=True)
            continue
        made.type, made.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        name = old.name
        graph.remove(node, safe=True)
        made.name = name
    if not choice.keep_blocks:
        graph.opset_imports.pop(DOMAIN, None)
    return model


def emit_linear(b: Builder, node: ir.Node, packed: PackedSite, choice: Lowering) -> ir.Value:
    """Emit nodes for a linear layer, `x @ W.T + bias`."""
    x = node.inputs[0]
    assert x is not None
    product = decoded_product if packed.site.name in choice.decoded else product_of(packed, choice)
    y = product(b, x, packed, choice)
    return b.node("Add", y, node.inputs[1]) if len(node.inputs) > 1 else y


SMALL = 2**18  # values of a table, such as of positions: a megabyte when it is decoded


def emit_embedding(b: Builder, node: ir.Node, packed: PackedSite, choice: Lowering) -> ir.Value:
    """Rows of the table, decoded after they are looked up; a small table is decoded when the file is loaded."""
    if packed.site.name in choice.decoded:
        return b.node("Gather", decoded_constant(b, packed, choice.dtype), node.inputs[0], axis=0)
    if prod(packed.site.shape) <= SMALL and not is_shared(packed):
        return b.node("Gather", folded_matrix(b, packed), node.inputs[0], axis=0)
    return decoded_rows(b, packed, node.inputs[0])


def emit_weight(b: Builder, node: ir.Node, packed: PackedSite, choice: Lowering) -> ir.Value:
    """Emit the decoded weight in its own shape."""
    if packed.site.name in choice.decoded:
        return unfolded(b, packed, decoded_constant(b, packed, choice.dtype))
    if packed.activation is not None:
        return signed_weight(b, packed, transposed=False)
    key = ("weight", packed.site.name)
    if key not in b.made:
        b.made[key] = unfolded(b, packed, folded_matrix(b, packed))
    return b.made[key]


def emit_quantized(b: Builder, node: ir.Node, packed: PackedSite, choice: Lowering) -> ir.Value:
    """Emit the quantized and dequantized input of a convolution."""
    x = node.inputs[0]
    assert x is not None
    if packed.activation is None or packed.site.name in choice.decoded:
        return x
    return quantized_input(b, x, packed)


EMIT = {"Linear": emit_linear, "Embedding": emit_embedding, "Weight": emit_weight, "Quantized": emit_quantized}


def static_product(b: Builder, x: ir.Value, packed: PackedSite, choice: Lowering) -> ir.Value:
    """Both factors dequantized; runtimes fuse that into an int8 product."""
    return b.node("MatMul", quantized_input(b, x, packed), signed_weight(b, packed, transposed=True))


def dynamic_product(b: Builder, x: ir.Value, packed: PackedSite, choice: Lowering) -> ir.Value:
    """The input quantized to unsigned int8 when the graph runs, an exact integer product, then the scales."""
    scale = grid(packed).scale.float().flatten()
    codes = b.constant(f"{packed.site.name}.codes", grid(packed).stored.t())
    if choice.per_token:
        inputs, zero, input_scale = tokens_quantized(b, x)
    else:
        inputs, input_scale, zero = b.shared("DynamicQuantizeLinear", x, num_outputs=3)
    sums = b.node("Cast", b.node("MatMulInteger", inputs, codes, zero), to=int(ir.DataType.FLOAT))
    both = b.constant(f"{packed.site.name}.scale", scale)
    if choice.per_token:
        return b.node("Mul", b.node("Mul", sums, input_scale), both)
    return b.node("Mul", sums, b.node("Mul", input_scale, both))


def tokens_quantized(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes of every token, 128 standing for zero, the 128, and the scale of each token: `Int8Dynamic.quantize`."""
    largest = b.shared("ReduceMax", b.shared("Abs", x), b.ints(-1), keepdims=1)
    floor = b.constant("smallest_largest", np.array(1e-12, dtype=np.float32))
    scale = b.shared("Div", b.shared("Max", largest, floor), b.constant("levels", np.array(127, dtype=np.float32)))
    codes = b.shared(
        "Add", b.shared("Round", b.shared("Div", x, scale)), b.constant("offset", np.array(128, np.float32))
    )
    return b.shared("Cast", codes, to=int(ir.DataType.UINT8)), b.constant("offset_u8", np.array(128, np.uint8)), scale


def weight_only_product(b: Builder, x: ir.Value, packed: PackedSite, choice: Lowering) -> ir.Value:
    """MatMulNBits: codes `[out, blocks, bytes]`, a scale per block, zero points where they are not half the grid."""
    integers, (num_rows, num_columns), name = grid(packed), packed.site.shape, packed.site.name
    bits, codes = HELD_BITS[integers.bits], blocks(packed)
    num_blocks = codes.shape[1]

    def per_block(values: Tensor) -> Tensor:
        return values.expand(num_rows, num_blocks).contiguous()

    if packed.activation is not None and choice.accuracy_level == 0:
        tokens, zero_code, input_scale = tokens_quantized(b, x)
        x = b.node("Mul", b.node("Sub", b.float(tokens), b.float(zero_code)), input_scale)
    inputs = [
        x,
        b.constant(f"{name}.blocks", codes),
        b.constant(f"{name}.scales", per_block(integers.scale.to(choice.dtype))),
    ]
    zero = per_block(zero_points(packed))
    if not integers.symmetric or integers.bits != bits:
        inputs.append(b.constant(f"{name}.zero_points", packed_zeros(zero, bits, choice.dtype)))
    return b.node(
        "MatMulNBits",
        *inputs,
        domain=MICROSOFT,
        K=num_columns,
        N=num_rows,
        bits=bits,
        block_size=block_size(packed),
        accuracy_level=choice.accuracy_level,
    )


def packed_zeros(zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Zero points as codes; as floats where one has a fraction, or lies outside the codes."""
    if bool((zero == zero.round()).all()) and zero.max() < 2**bits:
        return pack(zero.to(torch.uint8), bits)
    return zero.to(dtype)


def compressed_product(b: Builder, x: ir.Value, packed: PackedSite, choice: Lowering) -> ir.Value:
    """A float product with dequantized weights."""
    return b.node("MatMul", x, signed_weight(b, packed, transposed=True))


def decoded_product(b: Builder, x: ir.Value, packed: PackedSite, choice: Lowering) -> ir.Value:
    """A float product with the weight as it was decoded."""
    return b.node("MatMul", x, b.shared("Transpose", decoded_constant(b, packed, choice.dtype), perm=(1, 0)))


def folded_product(b: Builder, x: ir.Value, packed: PackedSite, choice: Lowering) -> ir.Value:
    """A float product with a weight that is decoded in the graph, once, when the file is loaded."""
    return b.node("MatMul", x, b.shared("Transpose", folded_matrix(b, packed), perm=(1, 0)))


def folded_matrix(b: Builder, packed: PackedSite) -> ir.Value:
    """The weight matrix `[out, in]`, decoded in the graph, once, when the file is loaded."""
    key = ("matrix", packed.site.name)
    if key not in b.made:
        b.made[key] = decoded_rows(b, packed, None)
    return b.made[key]


def quantized_input(b: Builder, x: ir.Value, packed: PackedSite) -> ir.Value:
    """Through int8 and back, with the codes moved up by 128."""
    assert packed.activation is not None
    scale, zero = packed.activation.params["scale"].item(), packed.activation.params["zero_point"].item() + 128
    steps = b.constant(f"input_scale_{scale!r}", np.array(scale, dtype=np.float32))
    zero_point = b.constant(f"input_zero_{zero}", np.array(zero, dtype=np.uint8))
    return b.shared("DequantizeLinear", b.shared("QuantizeLinear", x, steps, zero_point), steps, zero_point)


def signed_weight(b: Builder, packed: PackedSite, *, transposed: bool) -> ir.Value:
    """Signed codes and one scale per output channel, dequantized. The zero points are all 0 and could be left out, but
    then ONNX Runtime (1.31) multiplies in float where the input is a matrix. Every weight has zero points of its own:
    under `session.x64quantprecision` ONNX Runtime makes weights unsigned, and replaces the zero points of each."""
    name, codes = packed.site.name, grid(packed).stored
    shaped = codes.t() if transposed else packed.site.fold.unfold(codes)
    scale = b.constant(f"{name}.scale", grid(packed).scale.float().flatten())
    zero = b.constant(f"{name}.zeros", np.zeros(packed.site.shape[0], dtype=np.int8))
    return b.shared("DequantizeLinear", b.constant(f"{name}.codes", shaped), scale, zero, axis=1 if transposed else 0)


def decoded_constant(b: Builder, packed: PackedSite, dtype: torch.dtype) -> ir.Value:
    """The decoded weight matrix `[out, in]`."""
    name = f"{packed.site.name}.decoded"
    return b.made.get(name) or b.constant(name, packed.encoded.decode(dtype))


Product = Callable[[Builder, ir.Value, PackedSite, Lowering], ir.Value]


class ProductRule(NamedTuple):
    """One way to multiply a linear site: the sites it fits, and the function that writes the product."""

    fits: Callable[[PackedSite], bool]
    product: Product


def static(packed: PackedSite) -> bool:
    """True if inputs and weights are int8, both with scales fixed beforehand."""
    return packed.activation is not None and packed.activation.format == "int8-static" and plain_int8(packed)


def dynamic(packed: PackedSite) -> bool:
    """True if inputs and weights are int8, the inputs' scales taken when the model runs."""
    return packed.activation is not None and packed.activation.format == "int8-dynamic" and plain_int8(packed)


def plain_int8(packed: PackedSite) -> bool:
    """True if weights are signed bytes with one scale per row."""
    integers = packed.encoded.integers
    return integers is not None and integers.plain_int8


def weight_only(packed: PackedSite) -> bool:
    """True if weights are integers in blocks; inputs are float, or int8 with scales taken when the model runs."""
    inputs = packed.activation.format if packed.activation else None
    return packed.encoded.integers is not None and inputs in (None, "int8-dynamic")


def plain(packed: PackedSite) -> bool:
    """True if weights are 16-bit floats."""
    return packed.is_plain


ROWS = [
    ProductRule(static, static_product),
    ProductRule(dynamic, dynamic_product),
    ProductRule(weight_only, weight_only_product),
    ProductRule(plain, folded_product),
]


def product_of(packed: PackedSite, choice: Lowering) -> Product:
    """The first row that fits; the client has refused all others before."""
    if choice.rounds_inputs and plain_int8(packed) and not static(packed) and not is_shared(packed):
        return compressed_product
    return next(row.product for row in ROWS if row.fits(packed))


def holds(packed: PackedSite) -> bool:
    """True if a row fits the site in its place."""
    if packed.is_linear or packed.site.kind == "linear":
        return any(row.fits(packed) for row in ROWS)
    if packed.site.kind == "conv" and static(packed):
        return True
    return packed.is_plain or (packed.activation is None and packed.encoded.integers is not None)


def inexact(model: ir.Model) -> str | None:
    """A note on what the runtime rounds differently from the artifact; None if nothing."""
    kinds = {node.op_type for node in model.graph}
    rounded = []
    if "MatMulNBits" in kinds:
        rounded.append("the inputs of MatMulNBits to int8, a block of columns at a time")
    if "DynamicQuantizeLinear" in kinds:
        rounded.append(
            "int8-dynamic inputs with one scale for all tokens (--per-token gives each its own, and is slower)"
        )
    return f"ONNX Runtime rounds {'; and '.join(rounded)}" if rounded else None
