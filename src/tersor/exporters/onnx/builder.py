"""Nodes and constants added to an ONNX graph, each shared where the same one is asked for twice."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tersor.exporters.onnx.names import name_in, path_of

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
TYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}


class Builder:
    """Adds nodes before a node of a graph.

    Attributes:
        graph: what is added to.
        dtype: the type that the graph computes in, float32 or float16.
        made: constants and shared nodes, by what they are.
        path: the layer that new nodes are named after.
    """

    def __init__(self, graph: ir.Graph, dtype: torch.dtype):
        self.graph, self.dtype = graph, dtype
        self.made: dict[Any, Any] = {}
        self.place: ir.Node | None = None
        self.path = ""

    def at(self, place: ir.Node, path: str | None = None) -> "Builder":
        """Add nodes before `place` from here on, in its layer or the one given."""
        self.place, self.path = place, path_of(place) if path is None else path
        return self

    def node(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", num_outputs: int = 1, **attributes: Any
    ) -> Any:
        """A new node; its output, or a list of them where there are more."""
        assert self.place is not None
        added = ir.node(kind, inputs, attributes or None, domain=domain, num_outputs=num_outputs)
        added.name = name_in(self.path, kind)
        made = f"{kind}_{len(self.made)}_{self.place.outputs[0].name}"
        self.made[made] = added
        for i, output in enumerate(added.outputs):
            output.name = f"{made}_{i}"
        self.graph.insert_before(self.place, added)
        if domain:
            self.graph.opset_imports[domain] = 1
        return added.outputs[0] if num_outputs == 1 else list(added.outputs)

    def shared(self, kind: str, *inputs: ir.Value | None, num_outputs: int = 1, **attributes: Any) -> Any:
        """Add a node as `node` does, or return the one that was made of the same inputs before."""
        key = (kind, tuple(id(value) for value in inputs), tuple(sorted(attributes.items())))
        if key not in self.made:
            self.made[key] = self.node(kind, *inputs, num_outputs=num_outputs, **attributes)
        return self.made[key]

    def constant(self, name: str, values: Tensor | np.ndarray) -> ir.Value:
        """The value of a constant tensor, which is stored under this name once."""
        if name not in self.made:
            value = ir.Value(name=name)
            value.const_value = as_tensor(name, values)
            value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
            self.graph.initializers[name] = value
            self.made[name] = value
        return self.made[name]

    def ints(self, *values: int) -> ir.Value:
        """A constant of a few whole numbers, such as a shape."""
        return self.constant(f"ints_{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def float(self, value: ir.Value) -> ir.Value:
        """The value cast to what the graph computes in."""
        return self.node("Cast", value, to=int(TYPES[self.dtype]))


def as_tensor(name: str, values: Tensor | np.ndarray) -> ir.Tensor:
    """A tensor of ONNX; NumPy has no bfloat16, so its bits are handed over."""
    if isinstance(values, Tensor) and values.dtype == torch.bfloat16:
        bits = values.contiguous().view(torch.int16).numpy()
        return ir.Tensor(bits.view(ir.DataType.BFLOAT16.numpy()), name=name)
    array = values.detach().contiguous().numpy() if isinstance(values, Tensor) else np.asarray(values, order="C")
    return ir.Tensor(array, name=name)
