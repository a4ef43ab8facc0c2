"""Names of nodes: the path of the layer in the model, then the operator, such as `encoder.layer.0.output.dense/MatMul`.

Profilers show them, and so does `tersor explain`. torch.export notes the layer of every operator it follows; what is
put in an operator's place keeps its layer.
"""

import ast
import re
from collections import Counter

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # the modules that were entered, outermost first, and the operator
ROOT = "model"  # what trace.py calls the model
SLICE = re.compile(r"\.slice\([^)]*\)")  # a part of a list of layers, whose layers keep their numbers


def name_by_layer(graph: ir.Graph) -> None:
    """Name every node of a traced graph by its layer."""
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        paths = [path for path in scopes[:-1] if path == ROOT or path.startswith(f"{ROOT}.")]
        path = SLICE.sub("", paths[-1]) if paths else ""
        node.name = name_in(path.removeprefix(ROOT).lstrip("."), node.op_type)


def name_in(layer: str, kind: str) -> str:
    """The name of an operator in a layer; the layer is empty for the model itself."""
    return f"{layer}/{kind}" if layer else kind


def path_of(node: ir.Node | None) -> str:
    """The layer that a node is named after; empty where there is none.

    >>> path_of(ir.node("Add", [], name="encoder.layer.0/Add"))
    'encoder.layer.0'
    """
    return (node.name or "").rpartition("/")[0] if node is not None else ""


def make_unique(graph: ir.Graph) -> None:
    """Number the nodes that share a name: `dense/Mul`, `dense/Mul_2`, ..."""
    seen: Counter[str] = Counter()
    for node in graph:
        name = node.name or node.op_type
        seen[name] += 1
        node.name = f"{name}_{seen[name]}" if seen[name] > 1 else name
