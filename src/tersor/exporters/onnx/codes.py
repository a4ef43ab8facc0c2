"""Packed weights of integer grids as constants and ONNX operators that decode them.

Codes are unsigned and packed as they are in the artifact: 2, 4 or 8 bits each, the first of a byte in its low bits.
Grids of 3 bits are held in 4, of 5 and 6 bits in 8. Where a byte is one code of a symmetric grid, it is signed, so that
zero stands for zero.
"""

import numpy as np
import onnx_ir as ir
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from tersor.exporters.contract import PackedSite
from tersor.exporters.onnx.builder import Builder
from tersor.formats.packing import pack, packed_width
from tersor.formats.views import IntegerView

HELD_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def grid(packed: PackedSite) -> IntegerView:
    """The weight as integers with scales; only called for integer formats."""
    integers = packed.encoded.integers
    assert integers is not None
    return integers


def stored_codes(packed: PackedSite) -> UInt8[Tensor, "out width"]:
    """The codes of each row, packed."""
    return pack(grid(packed).codes, HELD_BITS[grid(packed).bits])


def signed_codes(packed: PackedSite) -> Int8[Tensor, "out in"]:
    """The codes of each row of a symmetric grid, one in a byte."""
    return grid(packed).signed_codes.to(torch.int8)


LARGEST_BLOCK = 128  # of columns that share a scale; a scale for the whole row is repeated


def block_size(packed: PackedSite) -> int:
    """Columns in a block of MatMulNBits."""
    return grid(packed).group_size or LARGEST_BLOCK


def blocks(packed: PackedSite) -> UInt8[Tensor, "out blocks width"]:
    """The codes as MatMulNBits takes them; the last block ends in zeros where the columns do not fill it."""
    stored, size = stored_codes(packed), block_size(packed)
    num_blocks, width = -(-packed.site.shape[1] // size), packed_width(size, HELD_BITS[grid(packed).bits])
    padded = torch.nn.functional.pad(stored, (0, num_blocks * width - stored.shape[1]))
    return padded.view(len(stored), num_blocks, width)


def is_shared(packed: PackedSite) -> bool:
    """True if an embedding is a linear layer's weight, too: both then read the same codes."""
    return len(packed.site.owners) > 1 and packed.encoded.integers is not None


def zero_points(packed: PackedSite) -> Float[Tensor, "out groups"]:
    """Zero points in steps; those of asymmetric grids may have fractions."""
    return grid(packed).zero_points


def decoded_rows(b: Builder, packed: PackedSite, index: ir.Value | None) -> ir.Value:
    """The weight matrix `[out, in]`, or its rows at `index` `[..., in]`, as the graph computes it from the codes."""
    name, num_columns = packed.site.name, packed.site.shape[1]

    def rows(part: str, values: Tensor) -> ir.Value:
        constant = b.constant(f"{name}.rows.{part}", values)
        return constant if index is None else b.node("Gather", constant, index, axis=0)

    if (floats := packed.encoded.floats) is not None and floats.is_ordinary:
        return b.float(rows("values", floats.values))
    integers = grid(packed)
    bits = HELD_BITS[integers.bits]
    is_looked_up = index is not None and is_shared(packed)  # in the blocks of MatMulNBits, which are unsigned
    signed = integers.symmetric and bits == 8 and not is_looked_up
    if is_looked_up:
        stored = blocks(packed)
        assert index is not None
        found = b.node("Gather", b.constant(f"{name}.blocks", stored), index, axis=0)
        codes = unpacked(b, flattened(b, found), bits, num_columns, stored[0].numel())
    elif signed:
        codes = b.float(rows("codes", signed_codes(packed)))
    else:
        stored = stored_codes(packed)
        codes = unpacked(b, rows("codes", stored), bits, num_columns, stored.shape[1])
    scale = b.float(rows("scale", integers.scale))
    group_size = integers.group_size or num_columns
    has_groups = integers.scale.shape[1] > 1
    scale = by_column(b, scale, group_size, num_columns) if has_groups else scale
    if signed:
        return b.node("Mul", codes, scale)
    if integers.zero_byte is None:
        zero = b.constant(f"zero_{integers.bits}_{b.dtype}", np.array(2.0 ** (integers.bits - 1), dtype=kind(b)))
    else:
        step = b.constant(f"step_{integers.bits}_{b.dtype}", np.array(2.0**integers.bits / 256, kind(b)))
        zero = b.node("Mul", b.float(rows("zero_point", integers.zero_byte)), step)
        zero = by_column(b, zero, group_size, num_columns) if has_groups else zero
    return b.node("Mul", b.node("Sub", codes, zero), scale)


def by_column(b: Builder, values: ir.Value, group_size: int, num_columns: int) -> ir.Value:
    """One value per group, repeated for each of its columns."""
    column = np.arange(num_columns, dtype=np.int64) // group_size
    return b.node("Gather", values, b.constant(f"groups_{group_size}_{num_columns}", column), axis=-1)


def unpacked(b: Builder, codes: ir.Value, bits: int, num_codes: int, num_bytes: int) -> ir.Value:
    """Packed bytes `[..., num_bytes]` as one float per code, `[..., num_codes]`."""
    flat = b.float(codes) if bits == 8 else flattened(b, separated(b, codes, bits))
    if num_bytes * 8 // bits == num_codes:
        return flat
    return b.node("Slice", flat, b.ints(0), b.ints(num_codes), b.ints(-1))


def separated(b: Builder, codes: ir.Value, bits: int) -> ir.Value:
    """The codes of every byte on an axis of their own, as floats."""
    # Whole numbers in floating point: shifts of bytes are not everywhere what they should be (OpenVINO 2026.4).
    whole = b.float(codes)
    step = b.constant(f"levels_{bits}_{b.dtype}", np.array(2**bits, kind(b)))
    each = []
    for position in range(8 // bits):
        if position == 8 // bits - 1:
            each.append(b.node("Unsqueeze", whole, b.ints(-1)))
            break
        rest = b.node("Floor", b.node("Mul", whole, b.constant(f"per_{bits}_{b.dtype}", np.array(2.0**-bits, kind(b)))))
        each.append(b.node("Unsqueeze", b.node("Sub", whole, b.node("Mul", rest, step)), b.ints(-1)))
        whole = rest
    return b.node("Concat", *each, axis=-1)


def flattened(b: Builder, values: ir.Value) -> ir.Value:
    """The values with their last two axes merged into one."""
    others = b.node("Shape", values, start=0, end=-2)
    return b.node("Reshape", values, b.node("Concat", others, b.ints(-1), axis=0))


def unfolded(b: Builder, packed: PackedSite, matrix: ir.Value) -> ir.Value:
    """The matrix `[out, in]` in the weight's own shape."""
    fold = packed.site.fold
    value = matrix
    if tuple(fold.swapped_shape) != fold.shape:
        value = b.node("Reshape", matrix, b.ints(*fold.swapped_shape))
    if fold.view == "transposed":
        order = [1, 0, *range(2, len(fold.weight_shape))]
        value = b.node("Transpose", value, perm=order)
    return value


def kind(b: Builder) -> np.dtype:
    """The graph's floating-point type, as NumPy calls it."""
    return np.dtype("float16" if b.dtype == torch.float16 else "float32")
