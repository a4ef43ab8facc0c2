"""Pools, shapes and strides as XNNPACK has them; what is computed stays the same."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tersor.exporters.executorch.layers import HIGHEST, operators
from tersor.exporters.executorch.nodes import (
    aten,
    constant,
    is_dequantize,
    is_node,
    is_quantize,
    nodes_of,
    only_user,
    put,
    tidy,
)

ONES = "_ones"  # ends the name of a weight that only picks pixels


def suit_images(model: GraphModule) -> None:
    """Write pools and strides as XNNPACK has them; what is computed stays the same."""
    suit_pools(model)
    suit_views(model)
    pixels_by_convolution(model)


def suit_pools(model: GraphModule) -> None:
    """Means over whole images in the one form that XNNPACK has: with both axes kept, dropped afterwards."""
    for node in nodes_of(model):
        size = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else ()
        read: Any = node.args[0] if node.args else None
        if not is_node(read) or not isinstance(read.meta.get("val"), Tensor) or read.meta["val"].ndim != 4:
            continue
        whole = tuple(read.meta["val"].shape[2:])
        pooled = node.target == aten.avg_pool2d.default and tuple(node.args[1]) == whole and len(node.args) < 4
        pooled |= node.target == aten.adaptive_avg_pool2d.default and tuple(size[2:]) == (1, 1)
        axes = [axis % 4 for axis in node.args[1]] if node.target == aten.mean.dim and node.args[1] else []
        dropped = sorted(axes) == [2, 3] and len(node.args) < 3 and not node.kwargs
        if not pooled and not dropped:
            continue
        with model.graph.inserting_before(node):
            made = model.graph.call_function(aten.mean.dim, (read, [2, 3], True))
            if dropped:
                made = model.graph.call_function(aten.view.default, (made, [-1, read.meta["val"].shape[1]]))
        node.replace_all_uses_with(made)
    tidy(model)


def suit_views(model: GraphModule) -> None:
    """Say -1 for the one size of a new shape that only the running model knows, which XNNPACK wants."""
    for node in nodes_of(model):
        if node.target in (aten.view.default, aten.reshape.default):
            sizes = [-1 if is_node(size) else size for size in node.args[1]]
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
    tidy(model)


def pixels_by_convolution(model: GraphModule) -> None:
    """Every n-th row and column of images, as the shortcut of a ResNet takes them, by a convolution of one pixel for
    each channel, whose weight is 1: XNNPACK has no slices with steps. Codes stay the same codes."""
    for node in nodes_of(model):
        steps = pixel_steps(node)
        if steps is None:
            continue
        read = node.args[0]
        before = pixel_steps(read) if len(read.users) == 1 else None
        if before is not None:
            steps, read = [mine * other for mine, other in zip(steps, before, strict=True)], read.args[0]
        elif len(node.users) == 1 and pixel_steps(only_user(node)) is not None:
            continue  # the next one takes both
        channels = read.meta["val"].shape[1]
        with model.graph.inserting_before(node):
            ones = put(model, f"{node.name}{ONES}", torch.ones(channels, 1, 1, 1))
            made = model.graph.call_function(aten.conv2d.default, (read, ones, None, steps, [0, 0], [1, 1], channels))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
    tidy(model)


def int8_pixels(model: GraphModule) -> None:
    """The convolutions of `pixels_by_convolution` between codes get a weight of codes, too."""
    q = operators()
    for node in nodes_of(model):
        if not is_pixels(node) or not is_dequantize(node.args[0]) or not is_quantize(only_user(node)):
            continue
        weight, num = node.args[1], len(constant(model, node.args[1]))
        with model.graph.inserting_before(node):
            codes = put(model, f"{weight.target}_codes", torch.full((num, 1, 1, 1), HIGHEST, dtype=torch.int8))
            scale = put(model, f"{weight.target}_scale", torch.full((num,), 1 / HIGHEST))
            zeros = put(model, f"{weight.target}_zeros", torch.zeros(num, dtype=torch.int64))
            settings = (codes, scale, zeros, 0, -HIGHEST, HIGHEST, torch.int8)
            node.replace_input_with(weight, model.graph.call_function(q.dequantize_per_channel.default, settings))
    tidy(model)


def pixel_steps(node: Any) -> list[int] | None:
    """`[row, column]` steps of a slice over whole images `[row, channel, y, x]`; None for any other node."""
    if not is_node(node) or node.target != aten.slice.Tensor or len(node.args) < 5:
        return None
    _, axis, start, end, step = node.args
    if len(node.meta["val"].shape) != 4 or axis not in (2, 3) or start not in (None, 0) or end < 2**31 - 1:
        return None
    return [step, 1] if axis == 2 else [1, step]


def is_pixels(node: Any) -> bool:
    """True if a node is a convolution that `pixels_by_convolution` made."""
    weight: Any = node.args[1] if node.target == aten.conv2d.default else None
    return is_node(weight) and weight.op == "get_attr" and str(weight.target).endswith(ONES)
