"""Int8 convolutions as XNNPACK has kernels for them, and what lies between them.

Its kernels take codes and give codes, with the bias inside. So batch norms become a factor of the weight's scales, and
a bias. A result that goes into a quantizer, perhaps through a ReLU, is int8 as it is. One that goes elsewhere (into a
sum, as at the end of a residual block) is rounded to int8 as well: with the scale of a quantizer that reads it too, or
else with one for the range it has on calibration data. Sums, concatenations and means of nothing but such results have
int8 kernels, so their results are rounded in the same way; what only moves values moves codes.

Without calibration data such convolutions keep decoded weights and run in float. Linear layers need no such rounding:
where nothing quantizes their result, they take inputs with a scale per token and give floats.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tersor.activations.observers.min_max import MinMax
from tersor.activations.quantizers import IntStatic
from tersor.exporters.examples import Examples
from tersor.exporters.executorch.images import int8_pixels, is_pixels
from tersor.exporters.executorch.layers import EPS, HIGHEST, LOWEST, operators
from tersor.exporters.executorch.nodes import (
    CLAMPS,
    aten,
    clamped,
    constant,
    is_dequantize,
    is_node,
    is_quantize,
    is_zero_pad,
    nodes_of,
    only_user,
    put,
    tidy,
)
from tersor.methods.stats import Stats

Ranges = Mapping[str, tuple[float, int]]  # value -> scale and zero point
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default}
JOINS = {aten.add.Tensor: 2, aten.mean.dim: 1}  # with the number of values that they read
MOVERS = {
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.permute.default, aten.transpose.int, aten.max_pool2d.default, aten.clone.default),
}


def chain_int8(model: GraphModule, examples: Examples) -> tuple[int, int]:
    """Let the int8 layers of a model pass codes to each other wherever XNNPACK can.

    Returns how many values are rounded that the artifact leaves float, and how many int8 convolutions run in float.
    """
    fold_norms(model)
    move_pads(model)
    needed = None in results(model, {}).values()
    num_rounded = quantize_results(model, measured(model, examples) if needed else {})
    num_float = float_rest(model)
    drop_clamps(model)  # only now is it known which quantizers stay, and saturate in their place
    int8_pixels(model)
    return num_rounded, num_float


def fold_norms(model: GraphModule) -> None:
    """Fold a batch norm that is the only reader of an int8 convolution into its scales and bias."""
    for norm in nodes_of(model):
        if norm.target != aten._native_batch_norm_legit_no_training.default:
            continue
        conv, taken = norm.args[0], [use for use in norm.users if use.target == operator.getitem and use.args[1] == 0]
        if not is_int8(conv) or conv.target not in CONVOLUTIONS or len(conv.users) > 1:
            continue
        if len(taken) != len(norm.users) or None in norm.args[1:5]:
            continue
        gain, offset, mean, var = (constant(model, value).double() for value in norm.args[1:5])
        factor = gain / torch.sqrt(var + norm.args[6])
        codes, scale, *rest = conv.args[1].args
        scales = constant(model, scale).double() * factor
        signs = torch.where(scales < 0, -1, 1) * (scales != 0)
        values = constant(model, codes) * signs.to(torch.int8).view(-1, *[1] * (constant(model, codes).ndim - 1))
        bias = conv.args[2] if len(conv.args) > 2 else None
        old = 0.0 if bias is None else constant(model, bias).double() * factor
        with model.graph.inserting_before(conv):
            names = f"{conv.name}_codes", f"{conv.name}_scale", f"{conv.name}_bias"
            tensors = (
                values,
                torch.where(scales == 0, 1.0, scales.abs()).float(),
                (old + offset - mean * factor).float(),
            )
            parts = [put(model, *each) for each in zip(names, tensors, strict=True)]
            weight = model.graph.call_function(conv.args[1].target, (parts[0], parts[1], *rest))
        conv.args = (conv.args[0], weight, parts[2], *conv.args[3:])
        for use in taken:
            use.replace_all_uses_with(conv)
    tidy(model)


def move_pads(model: GraphModule) -> None:
    """Move zero padding from before a quantizer to behind it, where XNNPACK makes them part of the convolution."""
    for quantize in nodes_of(model):
        pad: Any = quantize.args[0] if is_quantize(quantize) else None
        if not is_node(pad) or not is_zero_pad(pad):
            continue
        with model.graph.inserting_before(quantize):
            first = model.graph.call_function(quantize.target, (pad.args[0], *quantize.args[1:]))
        for back in list(quantize.users):
            with model.graph.inserting_before(back):
                value = model.graph.call_function(back.target, (first, *back.args[1:]))
                moved = model.graph.call_function(pad.target, (value, *pad.args[1:]), dict(pad.kwargs))
            back.replace_all_uses_with(moved)
    tidy(model)


def results(model: GraphModule, ranges: Ranges) -> dict[Node, tuple[float, int] | None]:
    """Results of int8 convolutions, each with the scale and zero point to round it by.

    A result is taken after the clamp that is its only reader. Sums and concatenations of results, and their moved or
    padded values, count too. Scale and zero point are those of a quantizer that reads it, else of its range in
    `ranges`, else None.
    """
    found: dict[Node, tuple[float, int] | None] = {}

    def known(node: Any) -> bool:
        return is_node(node) and found.get(node) is not None

    node: Any
    for node in nodes_of(model):
        if moves(node) and known(node.args[0]):
            found[node] = found[node.args[0]]
            continue
        reads = node.all_input_nodes
        joins = len(reads) == JOINS.get(node.target) and all(map(known, reads))
        if joins or (is_int8(node) and node.target in CONVOLUTIONS):
            value = clamped(node)
            readers = quantizers(value)
            found[value] = (readers[0].args[1], readers[0].args[2]) if readers else ranges.get(value.name)
    return found


def quantize_results(model: GraphModule, ranges: Ranges) -> int:
    """Pass codes from one int8 kernel to the next. Returns how many values the artifact itself does not round."""
    num_rounded, q = 0, operators()
    for value, params in results(model, ranges).items():
        if params is None:
            continue
        users = list(value.users)
        num_rounded += not moves(value) and not all(is_quantize(user) for user in users)
        settings = (*params, LOWEST, HIGHEST, torch.int8)
        with model.graph.inserting_after(value):
            codes = model.graph.call_function(q.quantize_per_tensor.default, (value, *settings))
        for user in users:
            if is_quantize(user) and user.args[1:] == settings:
                user.replace_all_uses_with(codes)
                continue
            with model.graph.inserting_before(user):
                back = model.graph.call_function(q.dequantize_per_tensor.default, (codes, *settings))
            user.replace_input_with(value, back)
    tidy(model)
    return num_rounded


def drop_clamps(model: GraphModule) -> None:
    """Remove each ReLU or clamp whose only reader is a quantizer that saturates at the same codes."""
    for node in nodes_of(model):
        quantize: Any = only_user(node) if node.target in CLAMPS else None
        if not is_quantize(quantize):
            continue
        low, high = CLAMPS[node.target] or (node.args[1:] if len(node.args) > 2 else (-1.0, 1.0))
        scale, zero_point = quantize.args[1:3]
        if round(low / scale) + zero_point <= LOWEST and high >= (HIGHEST - zero_point) * scale:
            quantize.replace_input_with(node, node.args[0])
    tidy(model)


def measured(model: GraphModule, examples: Examples) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each result that no quantizer reads, for the range it has on the calibration inputs."""
    ends: dict[str, list[list[float]]] = {}

    class Watch(Interpreter):
        """An interpreter that records the smallest and largest number of every float value."""

        def run_node(self, n: Node) -> Any:
            made = super().run_node(n)
            if n.op == "call_function" and isinstance(made, Tensor) and made.dtype == torch.float32 and made.numel():
                ends.setdefault(n.name, []).append([float(made.min()), float(made.max())])
            return made

    with torch.inference_mode():
        for inputs in examples.calibration:
            Watch(model).run(*inputs.values())
    found = {}
    for name, values in ends.items():
        params = IntStatic(8).fit(Stats(ranges=torch.tensor(values)), MinMax())
        found[name] = float(params["scale"]), int(params["zero_point"])
    return found


def float_rest(model: GraphModule) -> int:
    """Int8 layers whose result is no code: linear ones get inputs with a scale per token, convolutions decoded weights;
    how many of the latter."""
    q, num_float = operators(), 0
    for node in reversed(nodes_of(model)):  # a layer that takes floats leaves floats to the one before it
        if not is_int8(node) or is_quantize(only_user(clamped(node))):
            continue
        read, weight = node.args[:2]
        if node.target == aten.linear.default:
            back = read.args[0] if is_zero_pad(read) else read
            with model.graph.inserting_before(back):
                x = back.args[0].args[0]
                chosen = model.graph.call_function(q.choose_qparams.tensor, (x, LOWEST, HIGHEST, EPS, torch.int8))
                scale, zero = (model.graph.call_function(operator.getitem, (chosen, i)) for i in (0, 1))
                settings = (scale, zero, LOWEST, HIGHEST, torch.int8)
                codes = model.graph.call_function(q.quantize_per_tensor.tensor, (x, *settings))
                made = model.graph.call_function(q.dequantize_per_tensor.tensor, (codes, *settings))
            if read is back:
                node.replace_input_with(back, made)
            else:
                read.replace_input_with(back, made)
            continue
        num_float += 1
        decoded = weight.target(*(constant(model, a) if is_node(a) else a for a in weight.args))
        with model.graph.inserting_before(node):
            node.replace_input_with(weight, put(model, f"{node.name}_decoded", decoded))
    tidy(model)
    return num_float


def is_int8(node: Any) -> bool:
    """True if a node is a product of codes with a fixed scale and a weight of codes."""
    if not is_node(node) or node.target not in CONVOLUTIONS | {aten.linear.default}:
        return False
    read, weight = node.args[:2]
    read = read.args[0] if is_zero_pad(read) else read
    return is_dequantize(read) and is_node(weight) and weight.target == operators().dequantize_per_channel.default


def moves(node: Any) -> bool:
    """True if a node only moves values and adds zeros."""
    return node.target in MOVERS or is_zero_pad(node) or is_pixels(node)


def quantizers(value: Any) -> list[Any]:
    """The quantizers that read a value, directly or after it was only moved."""
    found = [user for user in value.users if is_quantize(user)]
    return found + [each for user in value.users if moves(user) for each in quantizers(user)]
