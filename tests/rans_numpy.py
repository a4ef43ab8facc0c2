"""The loops of the entropy coder in numpy, one step for all lanes at a time: what the compiled ones are judged by.

About a hundred times slower than `tersor.codecs.rans_numba`, with the same bytes in and out.
"""

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt8, UInt16, UInt32
from numpy import ndarray

from tersor.codecs.bits import LONGEST, unzigzag
from tersor.codecs.counts import LARGEST

START = 65536


def decode(
    words: UInt16[ndarray, " padded"],
    num_words: int,
    num_lanes: int,
    symbols: UInt8[ndarray, "table slot"],
    spans: UInt32[ndarray, "table symbol"],
    low: int,
    table_of: Int32[ndarray, " class"],
    row_class: Int32[ndarray, " rows"],
    column_class: Int32[ndarray, " in"],
    values: Int[ndarray, "rows in"] | Float32[ndarray, "rows in"],
    escapes: Int64[ndarray, " escapes"],
    rows: Int32[ndarray, " rows"] | Float32[ndarray, " rows"],
    columns: Int32[ndarray, " in"] | Float32[ndarray, " in"],
    taps: UInt32[ndarray, " two"],
    written: Int64[ndarray, " escapes"],
) -> int:
    """Fill `values`, each times that of its row and that of its column, and the places of escapes; how many there were,
    or -1 for a damaged stream. Columns are paths of a trellis where `taps` are given; tables then come in pairs, for
    even values and for odd ones."""
    num_rows, num_columns = values.shape
    bits = symbols.shape[1].bit_length() - (2 if len(taps) else 1)
    mask = (1 << bits) - 1
    if num_words < 2 * num_lanes:
        return -1
    first_words = words[: 2 * num_lanes].astype(np.int64)
    states, rest = (first_words[::2] << 16) | first_words[1::2], words.astype(np.int64)
    place, paths = 2 * num_lanes, [0] * num_columns
    found: list[int] = []
    for first in range(0, num_rows, num_lanes):
        active = min(num_lanes, num_rows - first)
        classes, x = row_class[first : first + active], states[:active].copy()
        for column in range(num_columns):
            if place > num_words:
                return -1
            table = table_of[classes + column_class[column]]
            slot = x & mask
            if len(taps):
                pairs = symbols[table // 2, 2 * slot].tolist(), symbols[table // 2, 2 * slot + 1].tolist()
                met, paths[column] = along(pairs, low, taps.tolist(), paths[column], written, len(found))
                if met is None:
                    return -1
                symbol, odd = np.array(met).T
                table = table + odd
            else:
                symbol = symbols[table, slot]
            span = spans[table, symbol].astype(np.int64)
            x = (span & 65535) * (x >> bits) + slot - (span >> 16)
            short = np.flatnonzero(x < START)
            x[short] = (x[short] << 16) | rest[place : place + len(short)]
            place += len(short)
            number = (symbol.astype(np.int32) + low).astype(rows.dtype)
            scale = rows[first : first + active] * columns[column]
            values[first : first + active, column] = (number * scale).astype(values.dtype)
            if not symbol.all():
                found += [(first + int(lane)) * num_columns + column for lane in np.flatnonzero(symbol == 0)]
        states[:active] = x
    if place != num_words or (states != START).any() or len(found) > len(escapes):
        return -1
    escapes[: len(found)] = found
    return len(found)


def along(
    pairs: tuple[list[int], list[int]],
    low: int,
    taps: list[int],
    path: int,
    written: Int64[ndarray, " escapes"],
    num_escapes: int,
) -> tuple[list[tuple[int, int]] | None, int]:
    """One column of a tile: of the symbols that are there for an even and for an odd value, those that the path takes,
    each with its parity, and the state after them. None for an escape that is not there, or of the other parity."""
    met = []
    for pair in zip(*pairs, strict=True):
        odd = path & 1
        value = low + pair[odd]
        if pair[odd] == 0:
            if num_escapes == len(written) or written[num_escapes] & 1 != odd:
                return None, path
            value, num_escapes = int(written[num_escapes]), num_escapes + 1
        met.append((pair[odd], odd))
        path = path >> 1 ^ taps[0] * (value >> 1 & 1) ^ taps[1] * odd
    return met, path


def encode(
    symbols: UInt8[ndarray, "rows in"],
    num_lanes: int,
    bits: int,
    counts: UInt32[ndarray, "table symbol"],
    starts: UInt32[ndarray, "table symbol"],
    table_of: Int32[ndarray, " class"],
    row_class: Int32[ndarray, " rows"],
    column_class: Int32[ndarray, " in"],
    words: UInt16[ndarray, " words"],
    escapes: Int64[ndarray, " escapes"],
    odd: UInt8[ndarray, "rows in"],
) -> tuple[int, int]:
    """Fill the ends of `words` and `escapes` with what `decode` reads; where each begins. `odd` says of each value by
    how much its table is further than that of its class; empty where none is."""
    num_rows, num_columns = symbols.shape
    place, escape, states = len(words), len(escapes), np.full(num_lanes, START, np.int64)
    for first in reversed(range(0, num_rows, num_lanes)):
        active = min(num_lanes, num_rows - first)
        classes, x = row_class[first : first + active], states[:active].copy()
        for column in reversed(range(num_columns)):
            table = table_of[classes + column_class[column]]
            if odd.size:
                table = table + odd[first : first + active, column]
            symbol = symbols[first : first + active, column]
            symbol = np.where(counts[table, symbol] == 0, np.uint8(0), symbol)
            out = (first + np.flatnonzero(symbol == 0)) * num_columns + column
            escapes[escape - len(out) : escape] = out
            escape -= len(out)
            count = counts[table, symbol].astype(np.int64)
            full = np.flatnonzero(x >= count << (32 - bits))
            words[place - len(full) : place] = x[full] & 65535
            place -= len(full)
            x[full] >>= 16
            x = (x // count << bits) + x % count + starts[table, symbol]
        states[:active] = x
    place -= 2 * num_lanes
    words[place : place + 2 * num_lanes] = np.stack([states >> 16, states & 65535], axis=1).reshape(-1)
    return place, escape


def count(
    symbols: UInt8[ndarray, "out in"],
    row_class: Int32[ndarray, " out"],
    column_class: Int32[ndarray, " in"],
    counts: Int64[ndarray, "class symbol"],
) -> None:
    """Add up how often every symbol stands in every class: `counts [class, symbol]`."""
    num_symbols = counts.shape[1]
    for row, row_symbols in zip(row_class, symbols, strict=True):
        index = (int(row) + column_class) * num_symbols + row_symbols
        counts.reshape(-1)[:] += np.bincount(index, minlength=counts.size)


def assign(
    symbols: UInt8[ndarray, "out in"],
    column_class: Int32[ndarray, " in"],
    costs: Float32[ndarray, "class symbol"],
    rates: Float32[ndarray, " class"],
    reach: int,
    row_class: Int32[ndarray, " out"],
) -> None:
    """Move every row to the class, at most `reach` away, that codes it in the fewest bits."""
    for row, row_symbols in enumerate(symbols):
        near = range(max(0, row_class[row] - reach), min(len(rates), row_class[row] + reach + 1))
        bits = [rates[each] + costs[each + column_class, row_symbols].sum(dtype=np.float64) for each in near]
        row_class[row] = near[int(np.argmin(bits))]


def complete(halves: Int32[ndarray, "rows in"], taps: UInt32[ndarray, " two"]) -> None:
    """Put the lowest bit, which the states of a trellis tell, to all others."""
    feed, back = taps.tolist()
    path = np.zeros(halves.shape[1], np.int32)
    for row, half in enumerate(halves):
        odd, bit = path & 1, half & 1
        halves[row] = half << 1 | odd
        path = path >> 1 ^ feed * bit ^ back * odd


def join16(symbols: UInt8[ndarray, " n"], planes: UInt8[ndarray, "1 n"], numbers: UInt16[ndarray, " n"]) -> None:
    """Numbers from eight bits above the lowest seven, those seven, and the sign above them."""
    rest = planes[0].astype(np.uint16)
    numbers[:] = rest & 127 | symbols.astype(np.uint16) << 7 | (rest & 128) << 8


def join32(symbols: UInt8[ndarray, " n"], planes: UInt8[ndarray, "3 n"], numbers: UInt32[ndarray, " n"]) -> None:
    """Numbers from eight bits above the lowest 23, those, and the sign above them, its byte the last of three."""
    low, middle, high = planes.astype(np.uint32)
    numbers[:] = low | middle << 8 | (high & 127) << 16 | symbols.astype(np.uint32) << 23 | (high & 128) << 24


def read_logs(
    data: UInt8[ndarray, " bytes"],
    place: int,
    k: int,
    follow: int,
    before: Int64[ndarray, " symbols"],
    logs: Int64[ndarray, " symbols"],
) -> int:
    """Fill `logs` from Rice codes (bits.py) of their differences to what is expected (tables.py): the place after them
    in bits; or -1 if one is too long or beyond the end of `data`, whose last eight bytes are no part of it, or if a
    logarithm is none. `before` is one longer: it begins with the symbol before the first."""
    stored, num_bits, latest = data.tobytes(), 8 * (len(data) - 8), 0
    lasts = before.tolist()
    for i in range(len(logs)):
        part = int.from_bytes(stored[place >> 3 : (place >> 3) + 8], "little") >> (place & 7)
        high = (~part & (part + 1)).bit_length() - 1
        place += high + 1 + k
        step = unzigzag((high << k) | ((part >> (high + 1)) & ((1 << k) - 1)))
        if follow:
            latest = max(0, latest + lasts[i + 1] - lasts[i]) if i else lasts[1]
        latest += step
        if high > LONGEST or place > num_bits or not 0 <= latest <= LARGEST:
            return -1
        logs[i] = latest
    return place
