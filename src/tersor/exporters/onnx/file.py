"""ONNX models to disk: named axes, no traces of the machine they were made on, large ones in two files."""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common

from tersor.core.errors import ArtifactError
from tersor.exporters.onnx.builder import MICROSOFT
from tersor.exporters.onnx.mark import PRODUCER, beside, name_data
from tersor.exporters.onnx.names import make_unique
from tersor.runtimes.onnx_decoder import CACHE, IN_PLACE

LARGEST = 2**31 - 2**24  # bytes of weights that one protobuf file holds, with some room for the graph


def save(model: ir.Model, path: Path) -> None:
    """Write the model; weights beyond 2 GB go to a file beside it, named `PATH.data`."""
    clean(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    make_unique(model.graph)
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = beside(path) if num_bytes > LARGEST else None
    try:
        ir.save(model, path, external_data=data and data.name)
        if data is not None:
            name_data(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error}") from None


def clean(model: ir.Model) -> None:
    """Take out what the tracer noted for its own developers, source files and their lines among it."""
    model.producer_name, model.producer_version = PRODUCER, None
    model.doc_string = None
    model.metadata_props.clear()
    if any(node.op_type == "GroupQueryAttention" for node in model.graph):
        model.metadata_props[CACHE] = IN_PLACE
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def describe(model: ir.Model) -> str:
    """`ONNX opset 21, IR 10; batch and sequence of any size; 36 MatMulNBits of com.microsoft`."""
    axes = list(
        dict.fromkeys(
            str(size.value) for v in model.graph.inputs for size in v.shape or () if not isinstance(size, int)
        )
    )
    sizes = f"{' and '.join(axes)} of any size" if axes else "all sizes fixed"
    own = Counter(node.op_type for node in model.graph if node.domain == MICROSOFT)
    parts = [f"ONNX opset {model.opset_imports['']}, IR {model.ir_version}", sizes]
    parts += [f"{number} {kind} of com.microsoft" for kind, number in own.items()]
    return "; ".join(parts)
