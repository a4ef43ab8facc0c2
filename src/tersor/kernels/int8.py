"""int8 inputs times int8 weights, by what PyTorch has.

The products are summed exactly, and the scales come after, in the same order for all kernels: the result is the same
for every batch, thread count and choice. `dot.py` has loops of our own, for weights that repay compiling them.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tersor.activations.quantizers import Activation, Int8Dynamic, IntStatic
from tersor.formats.contract import Encoded
from tersor.formats.overflow import keeps_pair_rule
from tersor.kernels.contract import Kernel, Layout, grid_of, scaled

MOST_COLUMNS = 2**31 // (256 * 127)  # whose sums, zero points included, cannot overflow int32
LARGE = 2**20  # weights, from which on oneDNN's own order can pay
SMALL = 2**14  # weights, up to which a second copy in float costs little
EXACT_COLUMNS = 2**24 // (128 * 127)  # whose products float32 adds exactly
QLINEAR = "qlinear_pointwise"


def is_int8(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True if a weight has int8 codes with one scale per row, and its inputs are int8."""
    if activation is None or activation.format not in ("int8-dynamic", "int8-static"):
        return False
    grid = encoded.integers
    return grid is not None and grid.plain_int8 and grid.shape[1] <= MOST_COLUMNS


def quantized(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Quantize the inputs: codes, and their scales."""
    if activation.format == "int8-dynamic":
        return Int8Dynamic().quantize(x)
    return IntStatic(8).quantize(x, activation.params), activation.params["scale"]


def offsets(encoded: Encoded, activation: Activation | None) -> Layout:
    """The amount that the zero point of a static input adds to every sum."""
    if activation is None or "zero_point" not in activation.params:
        return {}
    row_sums = grid_of(encoded).stored.sum(1, dtype=torch.int32)
    return {"offset": row_sums * activation.params["zero_point"].int()}


def has_int_mm(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True if `torch._int_mm` can run a layer. Of matrices of one column it gives sums that nobody asked for (2.13)."""
    return is_int8(encoded, activation, dtype) and encoded.shape[1] > 1


def run_int_mm(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply by `torch._int_mm` (oneDNN, with VNNI where the CPU has it)."""
    assert activation is not None
    codes, scale = quantized(x, activation)
    grid = grid_of(encoded)
    sums = torch._int_mm(codes, grid.stored.t())
    if layout:
        sums -= layout["offset"]
    return scaled(sums, scale, grid.scale, bias, x.dtype)


def has_qlinear(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True if oneDNN's linear layer for quantized inputs is there and exact, and the weight worth a second copy."""
    if not is_int8(encoded, activation, dtype) or grid_of(encoded).stored.numel() < LARGE:
        return False
    return qlinear_is_exact() or (qlinear_is_exact(64) and keeps_pair_rule(grid_of(encoded).stored))


@cache
def qlinear_is_exact(largest: int = 127) -> bool:
    """True if oneDNN adds products of codes up to `largest` exactly here: tried once for few and for many rows.

    Without VNNI instructions it adds two products of unsigned and signed bytes in 16 bits, which overflow silently.
    Two neighbours of 64 are the largest that do not.
    """
    if not hasattr(torch.ops.onednn, QLINEAR):
        return False
    weights = torch.tensor([[largest], [-largest]], dtype=torch.int8).repeat(16, 128)
    packed, ones, zeros = torch.ops.onednn.qlinear_prepack(weights, None), torch.ones(32), torch.zeros(32).long()
    after: Any = (1.0, 0, torch.float32, "none", [], "")
    for num_rows in (1, 7, 64):
        inputs = torch.full((num_rows, 128), 255, dtype=torch.uint8)
        sums = torch.ops.onednn.qlinear_pointwise(inputs, 1.0, 0, packed, ones, zeros, None, *after)
        if not torch.equal(sums, inputs.float() @ weights.float().t()):
            return False
    return True


def qlinear_layout(encoded: Encoded, activation: Activation | None) -> Layout:
    """The weight in oneDNN's blocked order, a second copy; and scales of one, for ours come after."""
    num_rows = encoded.shape[0]
    zero_point = int(activation.params["zero_point"]) if activation and activation.params else 0
    return {
        "weight": torch.ops.onednn.qlinear_prepack(grid_of(encoded).stored, None),
        "scales": torch.ones(num_rows, dtype=torch.float32, device="cpu"),
        "zeros": torch.zeros(num_rows, dtype=torch.int64, device="cpu"),
        "zero_point": zero_point + 128,
    }


def run_qlinear(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply by oneDNN's `qlinear_pointwise`, whose inputs are unsigned."""
    assert activation is not None
    codes, scale = quantized(x, activation)
    unsigned = codes.view(torch.uint8).bitwise_xor_(128)  # code + 128
    weight, scales, zeros, zero = layout["weight"], layout["scales"], layout["zeros"], layout["zero_point"]
    after: Any = (1.0, 0, torch.float32, "none", [], "")
    sums = torch.ops.onednn.qlinear_pointwise(unsigned, 1.0, zero, weight, scales, zeros, None, *after)
    return scaled(sums, scale, grid_of(encoded).scale, bias, x.dtype)


def is_small(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True for few weights: `torch._int_mm` is a slow loop where the processor has no VNNI instructions."""
    return is_int8(encoded, activation, dtype) and grid_of(encoded).stored.numel() < SMALL


def float_layout(encoded: Encoded, activation: Activation | None) -> Layout:
    """The codes as floats, in pieces of columns whose products float32 adds exactly."""
    pieces = grid_of(encoded).stored.float().split(EXACT_COLUMNS, 1)
    return {**{f"piece{i}": piece.contiguous() for i, piece in enumerate(pieces)}, **offsets(encoded, activation)}


def run_float(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply codes as floats, which is exact for whole numbers of this size."""
    assert activation is not None
    codes, scale = quantized(x, activation)
    pieces = codes.float().split(EXACT_COLUMNS, 1)
    products = [torch.mm(piece, layout[f"piece{i}"].t()) for i, piece in enumerate(pieces)]
    if len(products) == 1 and "offset" not in layout:
        return scaled(products[0], scale, grid_of(encoded).scale, bias, x.dtype)
    sums = torch.stack([product.int() for product in products]).sum(0, dtype=torch.int32)
    return scaled(sums - layout.get("offset", 0), scale, grid_of(encoded).scale, bias, x.dtype)


INT_MM = Kernel("int_mm", has_int_mm, offsets, run_int_mm, 1e-4)
ONEDNN = Kernel("onednn", has_qlinear, qlinear_layout, run_qlinear, 1e-4)
FLOAT = Kernel("float", is_small, float_layout, run_float, 1e-4)
