"""Scale classes: each row and each column of a matrix of integers has one; their sum says which table codes a value.

Trained weights, and the steps that a loss-aware quantizer gives them, vary in scale from row to row and from column to
column; that is nearly all there is to know about a value before it is decoded. Neighbours tell nothing more. A class
is an eighth of an octave of scale. The first guess comes from mean magnitudes; then rows and columns move to the class
that codes them in the fewest bits, naming the class included, so that classes which do not pay vanish.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int32, UInt8
from numpy import ndarray
from scipy.special import erfc

from tersor.codecs.rans import assign, count
from tersor.codecs.tables import NUM_SYMBOLS, make_tables

STEPS = 8  # classes per octave
SMALLEST, LARGEST = -26, 60  # eighths of octaves of a standard deviation, in steps of the grid
REACH = 4
MAX_PART = 250  # of a row's or a column's class, at first
LARGEST_PART = 254  # that the file can hold
ENOUGH_ROWS = 4096  # rows looked at to class the columns


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of a matrix: `row[i] + column[j]` at row i and column j, from 0 on."""

    row: Int32[ndarray, " out"]
    column: Int32[ndarray, " in"]


@cache
def deviations() -> tuple[Float[ndarray, " class"], Float[ndarray, " class"]]:
    """Classes, and the logarithm of the mean magnitude of rounded normal numbers of their standard deviation."""
    steps = np.arange(SMALLEST, LARGEST + 1, dtype=np.float64)
    edges = np.arange(2**11) + 0.5
    means = erfc(edges[None, :] / (np.sqrt(2) * 2 ** (steps[:, None] / STEPS))).sum(axis=1)
    return steps - SMALLEST, np.log(means)


def scales_of(magnitude: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Classes, from 0 on, of rows or columns by their mean magnitudes."""
    classes, logs = deviations()
    return np.interp(np.log(np.maximum(magnitude, 1e-30)), logs, classes)


def single_class(symbols: UInt8[ndarray, "out in"], low: int | None = None) -> Classes:
    """All values in one class: that of their scale, if the value `low` of symbol 0 is given."""
    level = 0.0
    if low is not None and symbols.size:
        often = np.bincount(symbols.reshape(-1), minlength=NUM_SYMBOLS)
        level = float(scales_of((often * np.abs(np.arange(NUM_SYMBOLS) + low)).sum() / symbols.size))
    return Classes(np.full(symbols.shape[0], round(level), np.int32), np.zeros(symbols.shape[1], np.int32))


def scale_classes(symbols: UInt8[ndarray, "out in"], low: int) -> Classes:
    """A first guess of the classes of rows and columns, from their mean magnitudes."""
    magnitude = np.abs(np.arange(NUM_SYMBOLS, dtype=np.float32) + low)[symbols]
    row, column = scales_of(magnitude.mean(axis=1)), scales_of(magnitude.mean(axis=0))
    column -= scales_of(magnitude.mean())
    least = column.min()
    return Classes(whole(row + least), whole(column - least))


def log_classes(symbols: UInt8[ndarray, "out in"], per_octave: int) -> Classes:
    """A first guess for symbols that are logarithms of scales, with `per_octave` symbols to a factor of two."""
    row, column = (symbols.mean(axis=axis, dtype=np.float64) * (STEPS / per_octave) for axis in (1, 0))
    row -= row.mean()
    return Classes(whole(row - row.min()), whole(column - column.min()))


def whole(classes: Float[ndarray, " n"]) -> Int32[ndarray, " n"]:
    """The classes rounded to whole numbers within bounds."""
    return np.rint(classes).clip(0, MAX_PART).astype(np.int32)


def fit_classes(symbols: UInt8[ndarray, "out in"], guess: Classes, low: int) -> Classes:
    """The classes that code a matrix in few bits, found from a first guess."""
    row, column = guess.row.copy(), guess.column.copy()
    stride = -(-len(symbols) // ENOUGH_ROWS)
    transposed = np.ascontiguousarray(symbols[::stride].T)
    for _ in range(2):
        assign(symbols, column, make_tables(counted(symbols, row, column), low).costs, rates(row, 1), REACH, row)
        costs = make_tables(counted(symbols, row, column), low).costs
        assign(transposed, np.ascontiguousarray(row[::stride]), costs, rates(column, stride), REACH, column)
    least = min(column.min(), LARGEST_PART - row.max(initial=0))
    return Classes(row + least, column - least)


def rates(parts: Int32[ndarray, " n"], stride: int) -> Float[ndarray, " class"]:
    """Bits of naming each class, by how often it is named; one never named costs as much as a new one."""
    often = np.bincount(parts).astype(np.float32)
    return ((np.log2(len(parts)) - np.log2(np.maximum(often, 0.25))) / stride).astype(np.float32)


def counted(symbols: UInt8[ndarray, "out in"], row: Int32[ndarray, " out"], column: Int32[ndarray, " in"]) -> ndarray:
    """The number of times that every symbol occurs in every class."""
    counts = np.zeros((int(row.max(initial=0)) + int(column.max(initial=0)) + 1, NUM_SYMBOLS), np.int64)
    count(symbols, row, column, counts)
    return counts
