"""The blocks of a language model (blocks.py) written out in the operators that ONNX Runtime has fast kernels for.

Attention   com.microsoft::GroupQueryAttention, which appends to the cache and multiplies in one go; in place, where
            past and present are given the same memory. It takes queries, keys and values of one product, where these
            are packed alike, and turns them by position itself, where the angles are in a table. It counts positions
            from the first token, padding or not; only their differences matter.
Rotary      com.microsoft::RotaryEmbedding on rows with heads side by side, as the products before give them
RmsNorm     SkipSimplifiedLayerNormalization with the sum before it, else SimplifiedLayerNormalization
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tersor.exporters.contract import PackedSite
from tersor.exporters.onnx.blocks import DOMAIN
from tersor.exporters.onnx.builder import MICROSOFT, Builder
from tersor.formats.contract import Encoded
from tersor.nn.packed import Fold

HEADS_LAST = [0, 2, 1, 3]  # the transposition between [batch, token, head, size] and [batch, head, token, size]


Tables = tuple[Tensor, Tensor] | None


@dataclass
class Parts:
    """The parts that the attention of a language model is built from.

    Attributes:
        sites: packed layers by name; fused products of several are added.
        tables: cosines and sines of all positions, `[position, size / 2]`.
        alone: names of the sites that are not fused with others.
    """

    sites: dict[str, PackedSite]
    tables: Tables
    alone: frozenset[str]


def lower_blocks(graph: ir.Graph, b: Builder, parts: Parts) -> None:
    """Replace every block's node. Attention comes first, for it takes rotated inputs in another layout."""
    for kind, emit in EMIT.items():
        for node in list(graph):
            if node.domain == DOMAIN and node.op_type == kind:
                b.at(node)
                replace(graph, node, emit(b, node, parts))
        remove_unused(graph)
    for value in [each for each in graph.inputs if each.name == "position_ids" and not each.uses()]:
        graph.inputs.remove(value)


def replace(graph: ir.Graph, node: ir.Node, made: list[ir.Value]) -> None:
    """Put new values in the place of a node's outputs, under their names."""
    names = [old.name for old in node.outputs]
    for old, new in zip(node.outputs, made, strict=True):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for new, name in zip(made, names, strict=True):
        new.name = name


def remove_unused(graph: ir.Graph) -> None:
    """Take out nodes that nothing reads any more."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value in outputs or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)


def emit_attention(b: Builder, node: ir.Node, parts: Parts) -> list[ir.Value]:
    """Every text of a batch is as long as the longest for the operator; the bias hides its padding."""
    query, key, value, past_key, past_value, bias, *sinks = (each for each in node.inputs if each is not None)
    total = b.shared("Shape", bias, start=3, end=4)
    length = b.shared("Cast", b.shared("Squeeze", total, b.ints(0)), to=int(ir.DataType.INT32))
    last = b.shared(
        "Sub", b.shared("Cast", total, to=int(ir.DataType.INT32)), b.constant("one", np.array([1], np.int32))
    )
    lengths = b.shared("Expand", last, b.shared("Shape", bias, start=0, end=1))
    attributes = {name: node.attributes[name].value for name in ("num_heads", "kv_num_heads", "scale", "softcap")}
    tables: list[ir.Value | None] = [None, None]
    straight = [unrotated(query), unrotated(key)]
    if parts.tables is not None and all(each is not None for each in straight):
        query, key = straight  # type: ignore[assignment]
        tables = [
            b.constant(f"rotary.{kind}", table.to(b.dtype))
            for kind, table in zip(("cos", "sin"), parts.tables, strict=True)
        ]
        attributes["do_rotary"] = 1
    rows: list[ir.Value | None] = [as_rows(b, each) for each in (query, key, value)]
    together = one_product(b, rows, parts) if attributes.get("do_rotary") else None
    if together is not None:
        rows = [together, None, None]
    return b.node(
        "GroupQueryAttention",
        *rows,
        past_key,
        past_value,
        lengths,
        length,
        *tables,
        None,
        bias,
        *sinks,
        domain=MICROSOFT,
        num_outputs=3,
        **attributes,
    )


def unrotated(x: ir.Value) -> ir.Value | None:
    """The input of the rotary node that made `x`; None if none did."""
    made = x.producer()
    return made.inputs[0] if made is not None and made.domain == DOMAIN and made.op_type == "Rotary" else None


def one_product(b: Builder, rows: list[ir.Value | None], parts: Parts) -> ir.Value | None:
    """Rows of several products of one input as those of one product; None where their weights differ in more than
    their codes."""
    products = [row.producer() if row is not None else None for row in rows]
    if not all(p is not None and p.domain == DOMAIN and p.op_type == "Linear" for p in products):
        return None
    nodes = [product for product in products if product is not None]
    packed = [parts.sites[node.attributes["site"].as_string()] for node in nodes]
    kinds = {(each.encoded.format, each.activation is None, each.site.shape[1]) for each in packed}
    plain = packed[0].encoded.integers is not None and packed[0].activation is None
    apart = any(each.site.name in parts.alone or len(each.site.owners) > 1 for each in packed)
    inputs = {tuple(node.inputs) for node in nodes}
    if not plain or apart or len(kinds) > 1 or len(inputs) > 1 or len(nodes[0].inputs) > 1:
        return None
    merged = stacked(packed)
    parts.sites[merged.site.name] = merged
    made = ir.node("Linear", nodes[0].inputs, {"site": merged.site.name}, domain=DOMAIN)
    nodes[0].graph.insert_after(nodes[0], made)  # type: ignore[union-attr]
    first, value = rows[0], made.outputs[0]
    assert first is not None
    value.name = f"{first.name}_{len(nodes)}"
    value.type, value.shape = first.type, ir.Shape([*list(first.shape or ())[:2], merged.site.shape[0]])
    return value


def stacked(packed: Sequence[PackedSite]) -> PackedSite:
    """Weights on top of each other: rows of codes, scales and zero points."""
    first, names = packed[0], [each.site.name for each in packed]
    parts = {name: torch.cat([each.encoded.parts[name] for each in packed]) for name in first.encoded.parts}
    shape = (sum(each.site.shape[0] for each in packed), first.site.shape[1])
    layer = names[0].rpartition(".")[0]
    name = "+".join([names[0], *(each.removeprefix(f"{layer}.") for each in names[1:])])
    site = replace_field(first.site, name=name, fold=Fold(shape))
    return PackedSite(site, Encoded(first.encoded.format, shape, parts), None)


def keep_rows(rows: ir.Value) -> None:
    """Whoever splits rows into heads only to put them together again gets the rows."""
    apart = [use.node.outputs[0] for use in rows.uses() if use.node.op_type == "Reshape"]
    for each in [rows, *apart]:
        for use in list(each.uses()):
            after = use.node.outputs[0]
            known = use.node.op_type == "Reshape" and after.shape is not None and rows.shape is not None
            if known and len(after.shape) == 3 and after.shape[2] == rows.shape[2]:  # type: ignore[arg-type, index]
                ir.convenience.replace_all_uses_with(after, rows)


def as_rows(b: Builder, x: ir.Value) -> ir.Value:
    """`[batch, head, token, size]` as `[batch, token, head * size]`, by undoing what made it, where possible."""
    made = x.producer()
    if made is not None and made.domain == DOMAIN and made.op_type == "Rotary":
        inner, cos, sin = (each for each in made.inputs if each is not None)
        num_heads = x.shape[1] if x.shape is not None else 0
        return rotated(b, as_rows(b, inner), cos, sin, int(num_heads))  # type: ignore[arg-type]
    if made is not None and made.op_type == "Transpose" and made.attributes["perm"].as_ints() == tuple(HEADS_LAST):
        apart = made.inputs[0]
        assert apart is not None
        split = apart.producer()
        whole = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
        if whole is not None and whole.shape is not None and len(whole.shape) == 3:
            return whole
        return b.node("Reshape", apart, b.ints(0, 0, -1))
    return b.node("Reshape", b.node("Transpose", x, perm=HEADS_LAST), b.ints(0, 0, -1))


def rotated(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, num_heads: int) -> ir.Value:
    """Rotate by tables of this call's own angles: every token of every text has its row in them."""
    half = int(cos.shape[-1]) // 2  # type: ignore[index, arg-type]
    tables = [
        b.shared("Slice", b.shared("Reshape", each, b.ints(-1, 2 * half)), b.ints(0), b.ints(half), b.ints(1))
        for each in (cos, sin)
    ]
    sizes = b.shared("Shape", cos, start=0, end=2)
    number = b.shared("Squeeze", b.shared("ReduceProd", sizes, keepdims=0))
    count = b.shared(
        "Range", b.constant("zero", np.array(0, np.int64)), number, b.constant("step", np.array(1, np.int64))
    )
    index = b.shared("Reshape", count, sizes)
    attributes = {"num_heads": num_heads, "rotary_embedding_dim": 2 * half} if num_heads else {}
    return b.node("RotaryEmbedding", x, index, *tables, domain=MICROSOFT, **attributes)


def emit_rotary(b: Builder, node: ir.Node, parts: Parts) -> list[ir.Value]:
    """Write a rotary node that something else than attention reads, in the layout that it has."""
    x, cos, sin = (each for each in node.inputs if each is not None)
    return [rotated(b, x, cos, sin, 0)]


def emit_norm(b: Builder, node: ir.Node, parts: Parts) -> list[ir.Value]:
    """Write an RMS norm, together with the sum that feeds it if there is one."""
    x, weight = (each for each in node.inputs if each is not None)
    epsilon = node.attributes["epsilon"].as_float()
    added = x.producer()
    terms = [each for each in added.inputs if each is not None] if added is not None and added.op_type == "Add" else []
    if not terms or not all(
        each.shape is not None and each.shape == x.shape and len(each.shape) == 3 for each in terms
    ):
        return [b.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon, stash_type=1)]
    assert added is not None
    made = b.at(added).node(
        "SkipSimplifiedLayerNormalization", *terms, weight, domain=MICROSOFT, num_outputs=4, epsilon=epsilon
    )
    for unused in made[1:3]:
        unused.name = ""
    made[3].type, made[3].shape = x.type, x.shape
    ir.convenience.replace_all_uses_with(x, made[3], replace_graph_outputs=True)
    return [made[0]]


EMIT = {"Attention": emit_attention, "Rotary": emit_rotary, "RmsNorm": emit_norm}
