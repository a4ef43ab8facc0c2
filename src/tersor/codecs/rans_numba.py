"""The loops of the entropy coder, compiled by numba: the same bytes as `rans_numpy.py`, a hundred times faster.

Imported only where coding happens. The compiled code is kept beside this file, or in the user's cache folder where
this one cannot be written, so that only the first process on a machine waits for the compiler.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

START = np.uint32(65536)  # the state of every lane before the first symbol is coded
KINDS = ("uint8", "int16", "int32")


def compiled(*signatures: str) -> Callable[[Any], Any]:
    """`njit` for these signatures, without the interpreter's lock; cached where a folder can be written."""

    def compile(function: Any) -> Any:
        try:
            return njit(list(signatures), nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no folder to keep compiled code in
            return njit(list(signatures), nogil=True, error_model="numpy")(function)

    return compile


@compiled(
    *(
        f"int64(uint16[::1], int64, int64, uint8[:, ::1], uint32[:, ::1], int32, int32[::1], int32[::1], int32[::1], "
        f"{kind}[:, ::1], int64[::1])"
        for kind in KINDS
    )
)
def decode(words, num_words, num_lanes, symbols, spans, low, table_of, row_class, column_class, values, escapes):
    """Fill `values` and the places of escapes; how many there were, or -1 for a damaged stream.

    `words` holds `num_lanes` words more than `num_words`, so that no read is outside.
    """
    num_rows, num_columns = values.shape
    mask = np.uint32(symbols.shape[1] - 1)
    bits = np.uint32(0)
    while (1 << bits) < symbols.shape[1]:
        bits += np.uint32(1)
    if num_words < 2 * num_lanes:
        return -1
    by_slot, by_symbol = symbols.reshape(-1), spans.reshape(-1)
    states, tables = np.empty(num_lanes, np.uint32), np.empty(num_lanes, np.int32)
    latest, block = np.empty(num_lanes, np.int32), np.empty((64, num_lanes), np.uint8)
    for lane in range(num_lanes):
        states[lane] = (np.uint32(words[2 * lane]) << np.uint32(16)) | np.uint32(words[2 * lane + 1])
    place, num_escapes = 2 * num_lanes, 0
    for first in range(0, num_rows, num_lanes):
        active = min(num_lanes, num_rows - first)
        for column in range(num_columns):
            if place > num_words:
                return -1
            at, within, escaped = column_class[column], column & 63, False
            for lane in range(active):  # short loops, each of which the compiler makes a few wide instructions
                tables[lane] = table_of[row_class[first + lane] + at]
            for lane in range(active):
                latest[lane] = by_slot[(tables[lane] << np.int32(bits)) + np.int32(states[lane] & mask)]
            for lane in range(active):
                x, span = states[lane], by_symbol[(tables[lane] << 8) + latest[lane]]
                high = np.uint32(np.uint32(span & np.uint32(65535)) * np.uint32(x >> bits))
                states[lane] = np.uint32(high + np.uint32(x & mask) - np.uint32(span >> np.uint32(16)))
            for lane in range(active):
                x = states[lane]
                short = x < START
                states[lane] = np.uint32((x << np.uint32(16)) | np.uint32(words[place])) if short else x
                place += short
            for lane in range(active):
                block[within, lane] = latest[lane]
                escaped |= latest[lane] == 0
            if within == 63 or column == num_columns - 1:  # rows far apart in memory are filled in turns
                for lane in range(active):
                    for step in range(within + 1):
                        values[first + lane, column - within + step] = low + np.int32(block[step, lane])
            if escaped:
                for lane in range(active):
                    if latest[lane] == 0:
                        if num_escapes == len(escapes):
                            return -1
                        escapes[num_escapes] = (first + lane) * num_columns + column
                        num_escapes += 1
    whole = place == num_words
    for lane in range(num_lanes):
        whole &= states[lane] == START
    return num_escapes if whole else -1


@compiled(
    "Tuple((int64, int64))(uint8[:, ::1], int64, int64, uint32[:, ::1], uint32[:, ::1], int32[::1], int32[::1], "
    "int32[::1], uint16[::1], int64[::1])"
)
def encode(symbols, num_lanes, bits, counts, starts, table_of, row_class, column_class, words, escapes):
    """Fill the ends of `words` and `escapes` with what `decode` reads; where each begins."""
    num_rows, num_columns = symbols.shape
    place, escape = len(words), len(escapes)
    states = np.full(num_lanes, START, np.uint32)
    num_tiles = (num_rows + num_lanes - 1) // num_lanes
    for tile in range(num_tiles - 1, -1, -1):
        first = tile * num_lanes
        active = min(num_lanes, num_rows - first)
        for column in range(num_columns - 1, -1, -1):
            for lane in range(active - 1, -1, -1):
                table = table_of[row_class[first + lane] + column_class[column]]
                symbol = symbols[first + lane, column]
                if counts[table, symbol] == 0:
                    symbol = 0
                if symbol == 0:
                    escape -= 1
                    escapes[escape] = (first + lane) * num_columns + column
                count, x = counts[table, symbol], states[lane]
                if np.uint64(x) >= np.uint64(count) << np.uint64(32 - bits):
                    place -= 1
                    words[place] = x & np.uint32(65535)
                    x = np.uint32(x >> np.uint32(16))
                whole = x // count
                states[lane] = np.uint32((whole << np.uint32(bits)) + (x - whole * count) + starts[table, symbol])
    for lane in range(num_lanes - 1, -1, -1):
        words[place - 1] = states[lane] & np.uint32(65535)
        words[place - 2] = states[lane] >> np.uint32(16)
        place -= 2
    return place, escape


@compiled("void(uint8[:, ::1], int32[::1], int32[::1], int64[:, ::1])")
def count(symbols, row_class, column_class, counts):
    """Add up how often every symbol stands in every class: `counts [class, symbol]`."""
    num_rows, num_columns = symbols.shape
    for row in range(num_rows):
        for column in range(num_columns):
            counts[row_class[row] + column_class[column], symbols[row, column]] += 1


@compiled("void(uint8[:, ::1], int32[::1], float32[:, ::1], float32[::1], int64, int32[::1])")
def assign(symbols, column_class, costs, rates, reach, row_class):
    """Move every row to the class, at most `reach` away, that codes it in the fewest bits.

    `costs [class, symbol]` in bits, `rates [row class]` what naming the class costs.
    """
    num_rows, num_columns = symbols.shape
    for row in range(num_rows):
        best, chosen = np.float32(np.inf), row_class[row]
        for candidate in range(max(0, row_class[row] - reach), min(len(rates), row_class[row] + reach + 1)):
            total = rates[candidate]
            for column in range(num_columns):
                total += costs[candidate + column_class[column], symbols[row, column]]
            if total < best:
                best, chosen = total, candidate
        row_class[row] = chosen


@compiled("void(uint8[::1], uint8[:, ::1], uint16[::1])")
def join16(symbols, planes, numbers):
    """Numbers from eight bits above the lowest seven, those seven, and the sign above them."""
    for i in range(len(numbers)):
        rest = np.uint16(planes[0, i])
        numbers[i] = (rest & 127) | (np.uint16(symbols[i]) << 7) | ((rest & 128) << 8)


@compiled("void(uint8[::1], uint8[:, ::1], uint32[::1])")
def join32(symbols, planes, numbers):
    """Numbers from eight bits above the lowest 23, those, and the sign above them, its byte the last of three."""
    for i in range(len(numbers)):
        high = np.uint32(planes[2, i])
        rest = np.uint32(planes[0, i]) | (np.uint32(planes[1, i]) << 8) | ((high & 127) << 16)
        numbers[i] = rest | (np.uint32(symbols[i]) << 23) | ((high & 128) << 24)
