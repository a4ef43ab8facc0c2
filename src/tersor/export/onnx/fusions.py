"""Patterns that runtimes fuse to slower kernels than the operators they are made of, written so that they do not."""

import onnx_ir as ir
import torch

from tersor.export.onnx.builder import TYPES


def sums_before_norms(model: ir.Model) -> None:
    """Residual sums that a LayerNormalization reads become `Sum`, which is the same.

    ONNX Runtime fuses `Add` and the norm to SkipLayerNormalization, whose kernel for the CPU works value by value: 55
    microseconds for 32 x 384 numbers (1.31), where both apart take 14.
    """
    for norm in model.graph:
        added = norm.inputs[0].producer() if norm.op_type == "LayerNormalization" and norm.inputs[0] else None
        if added is None or added.op_type != "Add" or added.outputs[0].dtype != TYPES[torch.float32]:
            continue
        added.op_type = "Sum"
        added.name = (added.name or "").removesuffix("Add") + "Sum"
