"""Nodes of a traced graph (torch.fx): what they are, and the tensors that they fetch."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tersor.exporters.executorch.layers import operators

aten = torch.ops.aten
# Part of the kernel before them, with their bounds where these are always the same.
CLAMPS = {aten.relu.default: (0.0, float("inf")), aten.relu6.default: (0.0, 6.0), aten.hardtanh.default: None}


def nodes_of(model: GraphModule) -> list[Any]:
    """The nodes, in the order they run; their arguments are of too many types to tell."""
    return list(model.graph.nodes)


def is_node(value: Any) -> bool:
    """True if an argument of a node is another node's result."""
    return isinstance(value, Node)


def is_quantize(node: Any) -> bool:
    """True if a node turns floats into codes, by a fixed scale."""
    return is_node(node) and node.target == operators().quantize_per_tensor.default


def is_dequantize(node: Any) -> bool:
    """True if a node turns codes into floats, by a fixed scale."""
    return is_node(node) and node.target == operators().dequantize_per_tensor.default


def is_zero_pad(node: Any) -> bool:
    """True if a node adds zeros around what it reads."""
    if not is_node(node) or node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return False
    rest = list(node.args[2:]) + list(node.kwargs.values())
    return all(each in ("constant", None, 0, 0.0) for each in rest) and min(node.args[1]) >= 0


def only_user(node: Any) -> Any:
    """The one node that reads a value; None if there are more."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def clamped(node: Any) -> Any:
    """A value, or the result of the clamp that is its only reader."""
    user = only_user(node)
    return user if user is not None and user.target in CLAMPS else node


def constant(model: GraphModule, node: Any) -> Tensor:
    """The tensor that a node fetches."""
    found: Any = model
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach()


def put(model: GraphModule, name: str, tensor: Tensor) -> Node:
    """A tensor that the model holds from now on, fetched at the graph's insertion point."""
    model.register_buffer(name, tensor.float() if tensor.is_floating_point() else tensor)
    return model.graph.get_attr(name)


def tidy(model: GraphModule) -> None:
    """Remove nodes and tensors that nothing reads any more."""
    model.graph.eliminate_dead_code()
    model.recompile()
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    for name, _ in [*model.named_buffers(), *model.named_parameters()]:
        if name not in used:
            path, _, last = name.rpartition(".")
            delattr(model.get_submodule(path), last)
