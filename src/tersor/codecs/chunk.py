"""One chunk of coded integers: some rows of a matrix.

number of escapes   varint
escapes             one varint each, as `zigzag` has them, without the low bits, in the order they are met
low bits            of all values, row by row, if the head says that some are kept as they are
words               16 bits each, little-endian: two for every lane's state, and what the lanes take in turns
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int
from numpy import ndarray

from tersor.codecs.bits import read_varint, unzigzag, write_varint, zigzag
from tersor.codecs.head import Head
from tersor.codecs.plan import Plan, symbols_of
from tersor.codecs.rans import Scales, complete
from tersor.codecs.rans import decode as decode_words
from tersor.codecs.rans import encode as encode_words
from tersor.core.errors import ArtifactError


def encode_chunk(plan: Plan, values: Int[ndarray, "rows in"], rows: slice) -> bytes:
    """The values of some rows of the plan's matrix."""
    symbols = symbols_of(values, plan.tables.low, plan.num_low_bits)
    row_class = np.ascontiguousarray(plan.classes.row[rows])
    num_lanes = plan.lanes_and_rows[0]
    odd = (values & 1).astype(np.uint8) if plan.num_states and not plan.num_low_bits else None
    words, places = encode_words(symbols, plan.tables, row_class, plan.classes.column, num_lanes, odd)
    high = (values.reshape(-1)[places] >> plan.num_low_bits).tolist()
    written = [write_varint(len(high)), *(write_varint(zigzag(value)) for value in high)]
    low = values if plan.num_stored_low_bits == plan.num_low_bits else values >> 1
    return b"".join([*written, pack_low_bits(low, plan.num_stored_low_bits), words.astype("<u2").tobytes()])


def pack_low_bits(values: Int[ndarray, "rows in"], num_bits: int) -> bytes:
    """The lowest bits of all values, one value after another, each lowest bit first."""
    if not num_bits:
        return b""
    bits = (values.reshape(-1, 1) >> np.arange(num_bits, dtype=values.dtype)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def unpack_low_bits(data: memoryview, num_values: int, num_bits: int) -> Int[ndarray, " values"]:
    """The inverse of `pack_low_bits`."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=num_values * num_bits, bitorder="little")
    return (bits.reshape(num_values, num_bits).astype(np.int32) << np.arange(num_bits, dtype=np.int32)).sum(
        axis=1, dtype=np.int32
    )


@np.errstate(over="ignore", invalid="ignore")  # scales of a damaged file: inf and NaN, as torch has them
def decode_chunk(
    head: Head,
    data: memoryview,
    rows: slice,
    values: Int[ndarray, "rows in"] | Float32[ndarray, "rows in"],
    kind: type[np.integer],
    scales: Scales | None = None,
) -> None:
    """Fill some rows.

    Args:
        kind: type of the integers that were coded; those of `values` too, unless it is float32.
        scales: scales of these rows and of all columns, for values in float32: `value * (row scale * column scale)`.

    Raises:
        ArtifactError: the bytes are damaged.
    """
    num_escapes, place = read_varint(data, 0)
    if num_escapes > min(len(data), values.size):
        raise ArtifactError(f"{num_escapes} values written out in {len(data)} bytes")
    written = []
    for _ in range(num_escapes):
        number, place = read_varint(data, place)
        written.append(unzigzag(number))
    num_stored = head.num_stored_low_bits
    num_packed = -(-values.size * num_stored // 8)
    low, words = data[place : place + num_packed], data[place + num_packed :]
    if len(low) < num_packed or len(words) % 2:
        raise ArtifactError(f"{len(data)} bytes, cut in the middle of a value")
    shift, limits = head.num_low_bits, np.iinfo(kind)
    least, most = int(limits.min) >> shift, int(limits.max) >> shift
    sure = head.tables.within(least, most)  # shared tables may hold values that this type does not
    high = values if not shift and sure else np.empty(values.shape, np.int32)
    places = np.empty(num_escapes, np.int64)
    row_class = np.ascontiguousarray(head.classes.row[rows])
    stream = np.frombuffer(words, "<u2").astype(np.uint16, copy=False)
    unsigned = high.view(np.uint8) if high.dtype == np.int8 else high  # the same bits
    factors = scales if high is values else None
    num_states = 0 if shift else head.num_states
    found = decode_words(
        stream,
        head.tables,
        row_class,
        head.classes.column,
        head.num_lanes,
        unsigned,
        places,
        factors,
        num_states,
        np.array(written, np.int64),
    )
    if found != num_escapes:
        raise ArtifactError("the coded values do not end where they should")
    check_range(written, least, most, kind)
    if factors is None:
        high.reshape(-1)[places] = written
    elif num_escapes:
        row, column = np.divmod(places, values.shape[1])
        values[row, column] = np.array(written, np.float32) * (factors[0][row] * factors[1][column])
    if not sure and high.size:
        check_range([int(high.min()), int(high.max())], least, most, kind)
    if high is not values:
        bits = unpack_low_bits(low, values.size, num_stored).reshape(values.shape)
        whole = (high << num_stored) | bits
        if shift and head.num_states:
            complete(whole, head.num_states)
        values[:] = whole if scales is None else whole.astype(np.float32) * np.multiply.outer(*scales)


def check_range(found: Sequence[int], least: int, most: int, kind: type[np.integer]) -> None:
    """Raises ArtifactError for a value, without its low bits, that the type does not hold."""
    if found and not least <= min(found) <= max(found) <= most:
        raise ArtifactError(f"a value between {min(found)} and {max(found)} is too large for {np.dtype(kind)}")
