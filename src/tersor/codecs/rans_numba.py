"""The loops of the entropy coder, compiled by numba.

Imported only where coding happens.
"""
# mypy: disable-error-code="no-untyped-def"

import numpy as np

from tersor.codecs.bits import LONGEST
from tersor.codecs.counts import BITS, TOTAL
from tersor.codecs.counts import LARGEST as MOST_LOG
from tersor.core.compiled import compiled

START = np.uint32(65536)  # the state of every lane before the first symbol is coded
KINDS = {"uint8": "int32", "int16": "int32", "int32": "int32", "float32": "float32"}  # of values, and their scales
WIDTH = 64  # columns decoded together


@compiled(
    "Tuple((int64, int64))(uint16[::1], int64, int64, uint32[::1], int64, uint8[::1], uint32[::1], uint32[:, ::1], "
    "int32[::1], uint8[:, ::1])"
)
def decode_block(words, num_words, place, states, active, by_slot, by_symbol, offsets, kinds, block):
    """Symbols of some columns of one tile into `block [column, lane]`: the place of the next word, or -1 beyond the
    end; and how many escapes there are. Indices are unsigned, so that nothing asks whether they are negative."""
    mask, bits, half = np.uint32(TOTAL - 1), np.uint32(BITS), np.uint32(65535)
    at, num_lanes, num_escapes = np.uint64(place), np.uint64(active), np.uint64(0)
    for column in range(np.uint64(len(kinds))):
        if at > np.uint64(num_words):
            return -1, 0
        tables, out = offsets[kinds[column]], block[column]
        for lane in range(num_lanes):
            x, table = states[lane], tables[lane]
            symbol = by_slot[np.uint64((table << bits) + (x & mask))]
            span = by_symbol[np.uint64((table << np.uint32(8)) + np.uint32(symbol))]
            x = np.uint32(np.uint32(span & half) * np.uint32(x >> bits) + (x & mask) - (span >> np.uint32(16)))
            short = x < START
            filled = np.uint32((x << np.uint32(16)) | np.uint32(words[at]))  # in any case: no branch to guess
            states[lane] = filled if short else x
            at += np.uint64(short)
            out[lane] = symbol
            num_escapes += np.uint64(symbol == 0)
    return np.int64(at), np.int64(num_escapes)


@compiled(
    "Tuple((int64, int64))(uint16[::1], int64, int64, uint32[::1], int64, uint8[::1], uint32[::1], uint32[:, ::1], "
    "int32[::1], uint8[:, ::1], int32, uint32[::1], uint32[::1], int64[::1], int64)"
)
def decode_paths(
    words, num_words, place, states, active, by_slot, by_symbol, offsets, kinds, block, low, taps, paths, written, first
):
    """Decode like `decode_block`, for columns that are paths of a trellis.

    The state of each path says if a value is even or odd, and so which of two neighbouring symbols it is. `written`
    holds the values of escapes, from `first` on, and as many more as there are lanes.
    """
    mask, bits, half = np.uint32(TOTAL - 1), np.uint32(BITS), np.uint32(65535)
    at, num_lanes, num_escapes = np.uint64(place), np.uint64(active), np.uint64(first)
    one, feed, back, least, wrong = np.uint32(1), taps[0], taps[1], np.uint32(low), np.uint32(0)
    num_written = np.uint64(len(written)) - np.uint64(len(states))  # as many more are there, to be read in vain
    for column in range(np.uint64(len(kinds))):
        if at > np.uint64(num_words) or num_escapes > num_written:
            return -1, 0
        tables, out, path = offsets[kinds[column]], block[column], paths[column]
        for lane in range(num_lanes):
            x, table, odd = states[lane], tables[lane], path & one
            pair = np.uint64((table << bits) + ((x & mask) << one))
            even_symbol, odd_symbol = np.uint32(by_slot[pair]), np.uint32(by_slot[pair + np.uint64(1)])
            symbol = np.uint32(even_symbol ^ ((even_symbol ^ odd_symbol) & (np.uint32(0) - odd)))  # no branch to guess
            span = by_symbol[np.uint64(((table + odd) << np.uint32(8)) + symbol)]
            x = np.uint32(np.uint32(span & half) * np.uint32(x >> bits) + (x & mask) - (span >> np.uint32(16)))
            short = x < START
            filled = np.uint32((x << np.uint32(16)) | np.uint32(words[at]))
            states[lane] = filled if short else x
            at += np.uint64(short)
            out[lane] = symbol
            value = least + symbol
            if symbol == 0:
                value = np.uint32(written[num_escapes])
                num_escapes += np.uint64(1)
                wrong |= (value & one) ^ odd
            path = np.uint32((path >> one) ^ (feed * ((value >> one) & one)) ^ (back * odd))
        paths[column] = path
    return np.int64(-1 if wrong else at), np.int64(num_escapes) - first


@compiled("Tuple((int32[::1], int32[::1]))(int32[::1])")
def kinds_of(column_class):
    """The different classes, ascending, and for every column which of them it has."""
    number = np.zeros((column_class.max() if len(column_class) else 0) + 1, np.int32)
    for at in column_class:
        number[at] = 1
    levels = np.flatnonzero(number).astype(np.int32)
    for kind in range(len(levels)):
        number[levels[kind]] = kind
    return levels, number[column_class]


@compiled("void(uint8[:, ::1], uint8[:, ::1], uint64, uint64)")
def turn(block, turned, num_lanes, width):
    """`block [column, lane]` as `turned [lane, column]`."""
    for lane in range(num_lanes):
        for step in range(width):
            turned[lane, step] = block[step, lane]


@compiled("int64(uint8[:, ::1], int64, int64, int64, int64, int64[::1], int64)")
def note_escapes(block, active, width, first, row_length, escapes, num_escapes):
    """Append the places of a block's escapes in the order in which they are met: how many there are now, or -1 for more
    than there is place for. `first` is the place of its first value."""
    for step in range(width):
        for lane in range(active):
            if block[step, lane] == 0:
                if num_escapes == len(escapes):
                    return -1
                escapes[num_escapes] = first + lane * row_length + step
                num_escapes += 1
    return num_escapes


@compiled(
    *(
        f"int64(uint16[::1], int64, int64, uint8[:, ::1], uint32[:, ::1], int32, int32[::1], int32[::1], int32[::1], "
        f"{kind}[:, ::1], int64[::1], {scale}[::1], {scale}[::1], uint32[::1], int64[::1])"
        for kind, scale in KINDS.items()
    )
)
def decode(
    words,
    num_words,
    num_lanes,
    symbols,
    spans,
    low,
    table_of,
    row_class,
    column_class,
    values,
    escapes,
    rows,
    columns,
    taps,
    written,
):
    """Fill `values`, each times that of its row and that of its column, and the places of escapes; how many there were,
    or -1 for a damaged stream.

    `words` holds `num_lanes` words more than `num_words`, so that no read is outside. Columns are paths of a trellis
    where `taps` are given; tables then come in pairs, for even values and for odd ones.
    """
    num_rows, num_columns = values.shape
    if num_words < 2 * num_lanes:
        return -1
    states, turned = np.empty(num_lanes, np.uint32), np.empty((num_lanes, WIDTH), np.uint8)
    block = np.empty((WIDTH, num_lanes), np.uint8)
    for lane in range(num_lanes):
        states[lane] = (np.uint32(words[2 * lane]) << np.uint32(16)) | np.uint32(words[2 * lane + 1])
    levels, kinds = kinds_of(column_class)
    offsets = np.empty((len(levels), num_lanes), np.uint32)
    by_slot, by_symbol, number = symbols.reshape(-1), spans.reshape(-1), rows.dtype.type
    place, num_escapes = 2 * num_lanes, 0
    paths = np.zeros(num_columns if len(taps) else 0, np.uint32)
    for first in range(0, num_rows, num_lanes):
        active = min(num_lanes, num_rows - first)
        for kind in range(len(levels)):
            for lane in range(active):
                offsets[kind, lane] = table_of[row_class[first + lane] + levels[kind]]
        for column in range(0, num_columns, WIDTH):  # rows far apart in memory are filled in turns
            width = min(WIDTH, num_columns - column)
            near = kinds[column : column + width]
            if len(taps):
                place, found = decode_paths(
                    words,
                    num_words,
                    place,
                    states,
                    active,
                    by_slot,
                    by_symbol,
                    offsets,
                    near,
                    block,
                    low,
                    taps,
                    paths[column : column + width],
                    written,
                    num_escapes,
                )
            else:
                place, found = decode_block(
                    words, num_words, place, states, active, by_slot, by_symbol, offsets, near, block
                )
            if place < 0:
                return -1
            turn(block, turned, active, width)  # so that what follows is done for many columns at once
            scale = columns[column : column + width]
            for lane in range(active):
                row, coded, out = rows[first + lane], turned[lane], values[first + lane, column : column + width]
                for step in range(width):
                    out[step] = number(low + np.int32(coded[step])) * (row * scale[step])
            if found:
                start = first * num_columns + column
                num_escapes = note_escapes(block, active, width, start, num_columns, escapes, num_escapes)
                if num_escapes < 0:
                    return -1
    whole = place == num_words
    for lane in range(num_lanes):
        whole &= states[lane] == START
    return num_escapes if whole else -1


@compiled(
    "Tuple((int64, int64))(uint8[:, ::1], int64, int64, uint32[:, ::1], uint32[:, ::1], int32[::1], int32[::1], "
    "int32[::1], uint16[::1], int64[::1], uint8[:, ::1])"
)
def encode(symbols, num_lanes, bits, counts, starts, table_of, row_class, column_class, words, escapes, odd):
    """Fill the ends of `words` and `escapes` with what `decode` reads; where each begins. `odd` says of each value by
    how much its table is further than that of its class; empty where none is."""
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
                if odd.size:
                    table += odd[first + lane, column]
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


@compiled("void(int32[:, ::1], uint32[::1])")
def complete(halves, taps):
    """Put the lowest bit, which the states of a trellis tell, to all others."""
    num_rows, num_columns = halves.shape
    paths, one, feed, back = np.zeros(num_columns, np.uint32), np.uint32(1), taps[0], taps[1]
    for row in range(num_rows):
        for column in range(num_columns):
            path, half = paths[column], halves[row, column]
            odd = path & one
            halves[row, column] = (half << 1) | np.int32(odd)
            paths[column] = (path >> one) ^ (feed * (np.uint32(half) & one)) ^ (back * odd)


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


@compiled("int64(uint8[::1], int64, int64, int64, int64[::1], int64[::1])")
def read_logs(data, place, k, follow, before, logs):
    """Fill `logs` from Rice codes (bits.py) of their differences to what is expected (tables.py): the place after them
    in bits; or -1 if one is too long or beyond the end of `data`, whose last eight bytes are no part of it, or if a
    logarithm is none. `before` is one longer: it begins with the symbol before the first."""
    num_bits, latest = 8 * (len(data) - 8), np.int64(0)
    for i in range(len(logs)):
        part = np.uint64(0)
        for byte in range(8):
            part |= np.uint64(data[(place >> 3) + byte]) << np.uint64(8 * byte)
        part >>= np.uint64(place & 7)
        high = 0
        while (part >> np.uint64(high)) & np.uint64(1) and high <= LONGEST:
            high += 1
        low = np.int64((part >> np.uint64(high + 1)) & np.uint64((1 << k) - 1))
        place += high + 1 + k
        number = (high << k) | low
        step = -(number >> 1) - 1 if number & 1 else number >> 1
        if follow:
            latest = max(latest + before[i + 1] - before[i], np.int64(0)) if i else before[1]
        latest += step
        if high > LONGEST or place > num_bits or not 0 <= latest <= MOST_LOG:
            return -1
        logs[i] = latest
    return place
