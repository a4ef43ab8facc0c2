"""Loops around `tile.py`, compiled by numba for each instruction at its first use: inputs to codes, and whole layers.

They take addresses, for making a NumPy array of a tensor costs as much as a small product.
"""
# mypy: ignore-errors

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from tersor.core.compiled import compiled
from tersor.kernels.instructions import Instruction
from tersor.kernels.tile import Tile, most_panels, run_tile

PANEL, BYTES = np.int64(16), np.int64(64)
CHUNK = 2**17  # bytes of codes that are made and used at a time: what a core's second cache holds
LEAST = np.float32(1e-12)
MAGIC = np.float32(1.5 * 2**23)  # the last bits of a float32 that this was added to are its value, rounded
LAST_BYTE = np.int32(255)


class Weight(NamedTuple):
    """Addresses of a weight in panels, and what belongs to it.

    Attributes:
        codes: int8 `[panel, num_steps, 16, 4]`.
        offset: int32, what is taken off every sum: zero points, and the 128 that makes inputs unsigned.
        scale: float32.
        input_scale: float32, of static inputs; 0 where every token has its own.
        zero_point: float32.
    """

    instruction: Instruction
    codes: int
    offset: int
    scale: int
    num_rows: int
    num_columns: int
    input_scale: int
    zero_point: int


class Span(NamedTuple):
    """Addresses of floats by token, the bytes from one to the next, and which panels are wanted."""

    addend: int
    addend_stride: int
    out: int
    out_stride: int
    first_panel: int
    last_panel: int


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """Convert an address to a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """The bits of a float32, as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 of these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@compiled()
def floats(address, length):
    """The floats at an address."""
    return carray(pointer(address), (length,), np.float32)


@compiled()
def code(value):
    """The nearest integer, halves to the even one, for values of a few bits."""
    return bits_of(value + MAGIC)


@compiled()
def dynamic_scale(x):
    """The scale of a token, by which its values are divided; NaN where one of them is."""
    largest = np.int32(0)
    for j in range(len(x)):  # of positive floats and their bits, the same are the largest
        largest = max(largest, bits_of(abs(x[j])))
    top = float_of(largest)
    return (LEAST if top < LEAST else top) / np.float32(127)


@compiled()
def put_codes(weight, x, scale, codes):
    """Codes of one token: `round(x / scale)`, or with a static zero point, clamped to eight bits."""
    flip = np.int32(128 if weight.instruction.unsigned else 0)
    if weight.input_scale:
        zero = floats(weight.zero_point, 1)[0]
        for j in range(len(x)):
            value = x[j] / scale + zero
            value = np.float32(0) if value != value else value
            value = min(max(value, np.float32(-128)), np.float32(127))
            codes[j] = code(value) + flip
    elif weight.instruction.unsigned:
        for j in range(len(x)):
            codes[j] = (code(x[j] / scale) & LAST_BYTE) ^ flip
    else:
        for j in range(len(x)):
            codes[j] = np.int8(code(x[j] / scale))


def new_codes(instruction, num_tokens, stride):
    """Memory for codes of tokens, in the type that an instruction takes; compiled loops run `typed_codes` for it."""
    raise NotImplementedError


@overload(new_codes)
def typed_codes(instruction, num_tokens, stride):
    """The code that numba compiles for `new_codes`."""
    kind = instruction.instance_class()
    dtype = np.dtype(np.int16 if kind.input_bytes == 8 else np.uint8 if kind.unsigned else np.int8)
    size = dtype.itemsize

    def made(instruction, num_tokens, stride):
        return np.empty((num_tokens, stride // size), dtype)

    return made


@compiled()
def quantize(weight, x, x_stride, num_tokens, codes, scales):
    """Codes and scales of tokens; columns beyond the last are left as they are, for their weights are 0."""
    for i in range(num_tokens):
        token = floats(x + i * x_stride, weight.num_columns)
        scales[i] = floats(weight.input_scale, 1)[0] if weight.input_scale else dynamic_scale(token)
        put_codes(weight, token, scales[i], codes[i])


@compiled()
def tile_rows(most, left):
    """The number of tokens, of those that are left, that go into the next tile."""
    if left >= most and not (most == 6 and left == 8):
        return most
    return 4 if left >= 4 else 2 if left >= 2 else 1


@compiled()
def multiply(weight, codes, codes_stride, scales, num_tokens, span):
    """Codes of tokens times the weight, scaled and added to, for the panels of a span."""
    num_steps = (weight.num_columns + 3) // 4
    kind, panel = weight.instruction, span.first_panel
    while panel < span.last_panel:
        whole = min(span.last_panel, weight.num_rows // PANEL) - panel
        if whole <= 0:
            last_panel(weight, codes, codes_stride, scales, num_tokens, span)
            return
        group = min(most_panels(kind, tile_rows(kind.most_rows, num_tokens)), whole)
        i = 0
        while i < num_tokens:
            rows = tile_rows(kind.most_rows, num_tokens - i)
            at_once, done = most_panels(kind, rows), 0
            while done < group:
                panels = at_once if group - done >= at_once else 1
                p = panel + done
                tile = Tile(
                    num_steps, codes + i * codes_stride, codes_stride,
                    weight.codes + p * num_steps * BYTES, num_steps * BYTES, weight.offset + p * BYTES,
                    scales + 4 * i, weight.scale + p * BYTES,
                    span.addend + i * span.addend_stride + p * BYTES, span.addend_stride,
                    span.out + i * span.out_stride + p * BYTES, span.out_stride,
                )  # fmt: skip
                run_tile(kind, rows, panels, tile)
                done += panels
            i += rows
        panel += group


@compiled()
def last_panel(weight, codes, codes_stride, scales, num_tokens, span):
    """The panel that is not full, by way of memory in which it is."""
    num_steps, p = (weight.num_columns + 3) // 4, weight.num_rows // PANEL
    width = weight.num_rows - PANEL * p
    addends, made = np.zeros((8, PANEL), np.float32), np.empty((8, PANEL), np.float32)
    i = 0
    while i < num_tokens:
        rows = tile_rows(weight.instruction.most_rows, num_tokens - i)
        for row in range(rows):
            given = floats(span.addend + (i + row) * span.addend_stride + p * BYTES, width)
            for j in range(width):
                addends[row, j] = given[j]
        tile = Tile(
            num_steps, codes + i * codes_stride, codes_stride,
            weight.codes + p * num_steps * BYTES, num_steps * BYTES, weight.offset + p * BYTES,
            scales + 4 * i, weight.scale + p * BYTES, addends.ctypes.data, BYTES, made.ctypes.data, BYTES,
        )  # fmt: skip
        run_tile(weight.instruction, rows, 1, tile)
        for row in range(rows):
            out = floats(span.out + (i + row) * span.out_stride + p * BYTES, width)
            for j in range(width):
                out[j] = made[row, j]
        i += rows


@compiled()
def dense(weight, x, x_stride, num_tokens, span):
    """A linear layer: float tokens at `x`, quantized and multiplied, some at a time."""
    stride = (weight.num_columns + 3) // 4 * weight.instruction.input_bytes
    chunk = min(num_tokens, max(24, CHUNK // stride // 24 * 24))
    codes, scales = new_codes(weight.instruction, chunk, stride), np.empty(chunk, np.float32)
    for first in range(0, num_tokens, chunk):
        num = min(chunk, num_tokens - first)
        quantize(weight, x + first * x_stride, x_stride, num, codes, scales)
        part = Span(
            span.addend + first * span.addend_stride, span.addend_stride,
            span.out + first * span.out_stride, span.out_stride, span.first_panel, span.last_panel,
        )  # fmt: skip
        multiply(weight, codes.ctypes.data, stride, scales.ctypes.data, num, part)
