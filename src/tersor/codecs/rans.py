"""Interleaved rANS (Duda 2013, https://arxiv.org/abs/1311.2540; Giesen 2014, https://arxiv.org/abs/1402.3392): numbers
to bits, each at the cost of its own probability, thirty-two streams side by side.

A chunk is some rows of a matrix of symbols. Lane l codes the rows l, l + lanes, l + 2 * lanes, ... from left to right,
and all lanes take turns, column by column, so that one sequence of 16-bit words serves them all. A state has 32 bits;
it starts at 65536 and takes a word from the sequence whenever it falls below that. A decoder that does not end with
every state at 65536, exactly at the last word, has read a damaged chunk.
"""

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt8, UInt16
from numpy import ndarray

from tersor.codecs.counts import BITS
from tersor.codecs.loops import loops
from tersor.codecs.tables import TableSet
from tersor.formats.trellis import taps

Scales = tuple[Float32[ndarray, " rows"], Float32[ndarray, " in"]]  # what rows and columns of integers are times


def encode(
    symbols: UInt8[ndarray, "rows in"],
    tables: TableSet,
    row_class: Int32[ndarray, " rows"],
    column_class: Int32[ndarray, " in"],
    num_lanes: int,
    odd: UInt8[ndarray, "rows in"] | None = None,
) -> tuple[UInt16[ndarray, " words"], Int64[ndarray, " escapes"]]:
    """The words of a chunk, and the places `row * in + column` of its escapes: of symbol 0, and of every symbol that
    the table leaves out.

    Args:
        odd: 1 where a value is odd, 0 where it is even, if columns are paths of a trellis: its states tell the decoder.
    """
    words, places = np.empty(symbols.size + 2 * num_lanes, np.uint16), np.empty(symbols.size, np.int64)
    tables = tables if odd is None else tables.by_parity
    word, place = loops().encode(
        symbols,
        num_lanes,
        BITS,
        tables.counts,
        tables.starts,
        tables.table_of,
        row_class,
        column_class,
        words,
        places,
        np.empty((0, 0), np.uint8) if odd is None else odd,
    )
    return words[word:].copy(), places[place:].copy()


def decode(
    words: UInt16[ndarray, " words"],
    tables: TableSet,
    row_class: Int32[ndarray, " rows"],
    column_class: Int32[ndarray, " in"],
    num_lanes: int,
    values: Int[ndarray, "rows in"] | Float32[ndarray, "rows in"],
    escapes: Int64[ndarray, " escapes"],
    scales: Scales | None = None,
    num_states: int = 0,
    written: Int64[ndarray, " escapes"] | None = None,
) -> int:
    """Fill `values`, and `escapes` with the places `row * in + column` of those that are written out elsewhere.

    Args:
        scales: of the rows and of the columns, for values in float32: each is multiplied by the product of its two.
        num_states: states of the trellis whose paths the columns are, from its state 0 on; 0 if they are none.
        written: the values of the escapes, which the paths go through.

    Returns:
        How many escapes there were, or -1 for a damaged chunk: bad words, or more escapes than there is place for.
    """
    padded = np.concatenate([words, np.zeros(num_lanes, np.uint16)])
    rows, columns = scales or tuple(np.ones(length, np.int32) for length in values.shape)
    symbols = tables.symbol_pairs if num_states else tables.symbols
    tables = tables.by_parity if num_states else tables
    return loops().decode(
        padded,
        len(words),
        num_lanes,
        symbols.reshape(len(symbols), -1),
        tables.spans,
        tables.low,
        tables.table_of,
        row_class,
        column_class,
        values,
        escapes,
        rows,
        columns,
        np.array(taps(num_states) if num_states else (), np.uint32),
        np.concatenate([np.empty(0, np.int64) if written is None else written, np.zeros(num_lanes, np.int64)]),
    )


def complete(halves: Int32[ndarray, "rows in"], num_states: int) -> None:
    """Turn values without their lowest bits into the values, by the states of the trellis whose paths columns are."""
    loops().complete(halves, np.array(taps(num_states), np.uint32))


def count(
    symbols: UInt8[ndarray, "out in"],
    row_class: Int32[ndarray, " out"],
    column_class: Int32[ndarray, " in"],
    counts: Int64[ndarray, "class symbol"],
) -> None:
    """Add up how often every symbol stands in every class."""
    loops().count(symbols, row_class, column_class, counts)


def assign(
    symbols: UInt8[ndarray, "out in"],
    column_class: Int32[ndarray, " in"],
    costs: Float32[ndarray, "class symbol"],
    rates: Float32[ndarray, " class"],
    reach: int,
    row_class: Int32[ndarray, " out"],
) -> None:
    """Move every row to the class, at most `reach` away, that codes it in the fewest bits, as the compiled loop says.
    Classes beyond `costs` cost as much as the last."""
    num_needed = len(rates) + int(column_class.max())
    if len(costs) < num_needed:
        costs = np.concatenate([costs, np.repeat(costs[-1:], num_needed - len(costs), axis=0)])
    loops().assign(symbols, column_class, np.ascontiguousarray(costs), rates, reach, row_class)
