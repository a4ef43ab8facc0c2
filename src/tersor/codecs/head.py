"""The head before the chunks of coded integers: lanes, tables, and the classes of rows and columns."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Int32
from numpy import ndarray

from tersor.codecs.bits import BitReader, BitWriter
from tersor.codecs.classes import Classes, counted, single_class
from tersor.codecs.plan import MOST_LANES, Plan, lanes_and_rows
from tersor.codecs.rans import decode as decode_words
from tersor.codecs.rans import encode as encode_words
from tersor.codecs.tables import MAX_CLASSES, TableSet, make_tables, read_tables, write_tables
from tersor.core.errors import ArtifactError
from tersor.formats.trellis import PATH, POLYNOMIALS

MOST_LOW_BITS = 28


def write_head(plan: Plan, shared: bool = False) -> bytes:
    """The bytes that a decoder needs before the first chunk; its tables only if the file's are not used."""
    out = BitWriter()
    num_lanes, chunk_rows = plan.lanes_and_rows
    if plan.num_states:
        out.gamma(plan.num_states.bit_length() - 1)
    out.gamma(plan.num_low_bits)
    out.gamma(num_lanes.bit_length() - 1)
    out.gamma(chunk_rows - 1)
    out.raw(int(shared), 1)
    if not shared:
        write_tables(plan.tables, out)
    for parts in (plan.classes.row, plan.classes.column):
        write_sequence(parts, out)
    return bytes(out)


def write_sequence(parts: Int[ndarray, " n"], out: BitWriter) -> None:
    """Append the classes of rows or columns to the bits in `out`."""
    same = len(parts) == 0 or (parts == parts[0]).all()
    out.raw(int(same), 1)
    if same:
        out.gamma(int(parts[0]) if len(parts) else 0)
        return
    symbols = (parts[:, None] + 1).astype(np.uint8)
    classes = single_class(symbols)
    tables = make_tables(counted(symbols, classes.row, classes.column), -1)
    num_lanes = lanes_and_rows((len(symbols), 1))[0]
    words, _ = encode_words(symbols, tables, classes.row, classes.column, num_lanes)
    out.gamma(num_lanes.bit_length() - 1)
    write_tables(tables, out)
    out.gamma(len(words))
    out.raw(int.from_bytes(words.astype("<u2").tobytes(), "little"), 16 * len(words))


@dataclass(frozen=True, eq=False)
class Head:
    """The decoder's parameters, read before the first chunk.

    Attributes:
        num_states: states of the trellis whose paths the columns are; 0 if they are none.
    """

    shape: tuple[int, int]
    num_low_bits: int
    num_lanes: int
    chunk_rows: int
    classes: Classes
    tables: TableSet
    num_states: int = 0

    @property
    def num_stored_low_bits(self) -> int:
        """Low bits less the lowest of those, where a trellis tells it."""
        return self.num_low_bits - (self.num_low_bits > 0 and self.num_states > 0)


def read_head(
    data: bytes, shape: tuple[int, int], dtype: torch.dtype, shared: TableSet | None = None, trellis: bool = False
) -> Head:
    """The inverse of `write_head`; `trellis` says that columns are paths of one. Raises ArtifactError for what no
    writer makes."""
    source = BitReader(data)
    num_states = 2 ** min(source.gamma(), 30) if trellis else 0
    if trellis and num_states not in POLYNOMIALS:
        raise ArtifactError(f"a trellis of {num_states} states; there are those of {', '.join(map(str, POLYNOMIALS))}")
    num_low_bits, lanes, chunk_rows = source.gamma(), source.gamma(), source.gamma() + 1
    fits = chunk_rows == PATH if trellis else chunk_rows <= max(1, shape[0]) + MOST_LANES
    if num_low_bits > MOST_LOW_BITS or 2**lanes > MOST_LANES or not fits:
        raise ArtifactError(f"{num_low_bits} low bits, {lanes} for the lanes, {chunk_rows} rows in a chunk")
    uses_shared = source.raw(1)
    if uses_shared and shared is None:
        raise ArtifactError("tables of the file are named, and it has none")
    tables = shared if uses_shared and shared is not None else read_tables(source)
    if not uses_shared:  # those of the file serve tensors of other types as well, so that values are checked one by one
        check_symbols(tables, dtype, num_low_bits)
    row, column = read_sequence(shape[0], source), read_sequence(shape[1], source)
    num_classes = int(row.max(initial=0)) + int(column.max(initial=0)) + 1
    if num_classes > len(tables.table_of):
        raise ArtifactError(f"{num_classes} classes, and tables for {len(tables.table_of)}")
    return Head(shape, num_low_bits, 2**lanes, chunk_rows, Classes(row, column), tables, num_states)


def check_symbols(tables: TableSet, dtype: torch.dtype, num_low_bits: int) -> None:
    """Raises ArtifactError if a table holds a value that the type does not."""
    limits, span = torch.iinfo(dtype), tables.span
    if span and not tables.within(limits.min >> num_low_bits, limits.max >> num_low_bits):
        raise ArtifactError(f"tables of the values {span[0]} to {span[1]} for {dtype}")


def read_sequence(length: int, source: BitReader) -> Int32[ndarray, " n"]:
    """The inverse of `write_sequence`."""
    if source.raw(1):
        value = source.gamma()
        if value >= MAX_CLASSES:
            raise ArtifactError(f"the class {value}; there are {MAX_CLASSES}")
        return np.full(length, value, np.int32)
    lanes, tables = source.gamma(), read_tables(source)
    check_symbols(tables, torch.uint8, 0)
    num_words = source.gamma()
    words = np.frombuffer(source.raw(16 * num_words).to_bytes(2 * num_words, "little"), "<u2")
    values = np.empty((length, 1), np.uint8)
    if len(tables.table_of) != 1 or 2**lanes > MOST_LANES:
        raise ArtifactError(f"{len(tables.table_of)} classes of classes, {lanes} for the lanes")
    classes = single_class(values)
    if decode_words(words, tables, classes.row, classes.column, 2**lanes, values, np.empty(0, np.int64)) != 0:
        raise ArtifactError("the classes of rows or columns are damaged")
    return values[:, 0].astype(np.int32)
