"""Loops around `float_tile.py`, compiled by numba at their first use."""
# mypy: ignore-errors

from typing import NamedTuple

import numpy as np

from tersor.core.compiled import compiled
from tersor.kernels.float_tile import Bits4, Bits8, Codes, panels_at_once, run_codes, tokens_at_once
from tersor.kernels.loops import floats

PANEL, BYTES = np.int64(16), np.int64(64)


class PackedPanels(NamedTuple):
    """Addresses of a weight in panels.

    Attributes:
        codes: uint8 `[panel, column, 8 or 16]`.
        scale: float32 `[panel, group, 16]`.
        zero: float32 `[panel, group, 16]`.
    """

    kind: Bits4 | Bits8
    codes: int
    scale: int
    zero: int
    num_rows: int
    num_columns: int
    group_size: int


class TokenJob(NamedTuple):
    """Addresses of tokens and results, and of the panels as floats; 0 where they are not decoded."""

    decoded: int
    x: int
    x_stride: int
    num_tokens: int
    addend: int
    out: int
    out_stride: int


@compiled()
def next_tokens(most, left):
    """The number of tokens, of those that are left, that go into the next tile."""
    if left >= most:
        return most
    return 6 if left >= 6 and left != 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@compiled()
def decode_panels(weight, panel, panels, decoded):
    """Panels as floats, one after another in `decoded`."""
    for p in range(panels):
        codes = codes_of(weight, panel + p, 0, 0, 0, np.int64(decoded.ctypes.data) + p * weight.num_columns * BYTES, 0)
        run_codes(weight.kind, weight.kind.bits, 0, 1, codes)


@compiled()
def codes_of(weight, panel, x, x_stride, addend, out, out_stride):
    """The addresses of a tile that begins at a panel."""
    bytes_of_panel = weight.num_columns * weight.kind.bits * 2
    grid_stride = (weight.num_columns + weight.group_size - 1) // weight.group_size * BYTES
    return Codes(
        weight.codes + panel * bytes_of_panel, bytes_of_panel, weight.num_columns, weight.group_size,
        weight.scale + panel * grid_stride, weight.zero + panel * grid_stride, grid_stride,
        x, x_stride, addend, out, out_stride,
    )  # fmt: skip


@compiled()
def floats_of(weight, decoded, x, x_stride, addend, out, out_stride):
    """The addresses of a tile of panels that are decoded."""
    columns = weight.num_columns
    return Codes(decoded, columns * BYTES, columns, columns, 0, 0, 0, x, x_stride, addend, out, out_stride)


@compiled()
def multiply(weight, panel, group, job):
    """All tokens times some full panels, at addresses that begin at these panels."""
    most, once = tokens_at_once(), job.decoded != 0
    i = 0
    while i < job.num_tokens:
        tokens = next_tokens(most, job.num_tokens - i)
        at_once, done = panels_at_once(tokens), 0
        while done < group:
            panels = at_once if group - done >= at_once else 1
            x, out = job.x + i * job.x_stride, job.out + i * job.out_stride + done * BYTES
            addend = job.addend + done * BYTES
            if once:
                decoded = job.decoded + done * weight.num_columns * BYTES
                tile = floats_of(weight, decoded, x, job.x_stride, addend, out, job.out_stride)
                run_codes(weight.kind, 32, tokens, panels, tile)
            else:
                tile = codes_of(weight, panel + done, x, job.x_stride, addend, out, job.out_stride)
                run_codes(weight.kind, weight.kind.bits, tokens, panels, tile)
            done += panels
        i += tokens


@compiled()
def unpacked(weight, x, x_stride, num_tokens, span):
    """A linear layer on float tokens. Panels are decoded for each tile of a few tokens, and once for many."""
    most, panel = tokens_at_once(), span.first_panel
    once = num_tokens > 2 * most
    at_once = panels_at_once(next_tokens(most, num_tokens))
    decoded = np.empty((at_once * weight.num_columns if once else 1, PANEL), np.float32)
    floats_at = np.int64(decoded.ctypes.data) if once else 0
    while panel < span.last_panel:
        group = min(span.last_panel, weight.num_rows // PANEL) - panel
        group = at_once if group >= at_once else 1
        if once:
            decode_panels(weight, panel, group, decoded)
        at = panel * BYTES
        if (panel + 1) * PANEL <= weight.num_rows:
            job = TokenJob(floats_at, x, x_stride, num_tokens, span.addend + at, span.out + at, span.out_stride)
            multiply(weight, panel, group, job)
        else:
            last_panel(
                weight,
                panel,
                TokenJob(floats_at, x, x_stride, num_tokens, span.addend + at, span.out + at, span.out_stride),
            )
        panel += group


@compiled()
def last_panel(weight, panel, job):
    """The panel that is not full, by way of memory in which it is."""
    width = weight.num_rows - PANEL * panel
    addends, made = np.zeros(PANEL, np.float32), np.empty((job.num_tokens, PANEL), np.float32)
    given = floats(job.addend, width)
    for j in range(width):
        addends[j] = given[j]
    to = TokenJob(
        job.decoded, job.x, job.x_stride, job.num_tokens,
        np.int64(addends.ctypes.data), np.int64(made.ctypes.data), BYTES,
    )  # fmt: skip
    multiply(weight, panel, 1, to)
    for token in range(job.num_tokens):
        row = floats(job.out + token * job.out_stride, width)
        for j in range(width):
            row[j] = made[token, j]
