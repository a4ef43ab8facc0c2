"""The plan for coding a matrix of integers: its window of symbols, classes and tables, chosen by what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int, Int64, UInt8
from numpy import ndarray

from tersor.codecs.classes import Classes, counted, fit_classes, log_classes, scale_classes, single_class
from tersor.codecs.tables import NUM_SYMBOLS, SYMBOL_BITS, TABLE_BITS, TableSet, make_tables
from tersor.formats.trellis import PATH, num_states_of

CHUNK = 2**18  # values coded together
PER_LANE = 2**13  # values that make a lane worth its 24 bits
MOST_LANES = 32
CENTRED = -128  # symbols 1 to 255 are -127 to 127


@dataclass(frozen=True, eq=False)
class Plan:
    """The parameters by which a matrix of integers is entropy-coded.

    Attributes:
        num_low_bits: lowest bits of every value that are stored uncoded.
        counts: occurrences of every symbol in every class.
        num_states: of the trellis whose paths the columns are, so that the lowest bits need not be said; 0 if they are
            none.
    """

    shape: tuple[int, int]
    num_low_bits: int
    classes: Classes
    tables: TableSet
    counts: Int64[ndarray, "class symbol"]
    num_states: int = 0

    @property
    def lanes_and_rows(self) -> tuple[int, int]:
        """The number of lanes of a matrix, and of its rows in a chunk; paths of a trellis are not cut."""
        return lanes_and_rows(self.shape, PATH if self.num_states else None)

    @property
    def num_stored_low_bits(self) -> int:
        """Low bits less the lowest of those, where a trellis tells it."""
        return self.num_low_bits - (self.num_low_bits > 0 and self.num_states > 0)


def best_plan(values: Int[ndarray, "out in"]) -> Plan:
    """The plan of `make_plan`, or one with a trellis if columns are its paths and that saves bytes."""
    plan = make_plan(values)
    num_states = num_states_of(values) if values.dtype == np.int16 else 0
    return min(plan, replace(plan, num_states=num_states), key=plan_bits) if num_states else plan


def make_plan(values: Int[ndarray, "out in"]) -> Plan:
    """Choose the classes and tables that code a matrix in few bits."""
    low, num_low_bits = window(values)
    symbols = symbols_of(values, low, num_low_bits)
    choices = [single_class(symbols, low)]
    if low == CENTRED and values.size and min(values.shape) > 1:
        choices.append(fit_classes(symbols, scale_classes(symbols, low), low))
    return cheapest(symbols, choices, low, num_low_bits)


def log_plan(values: UInt8[ndarray, "out in"], per_octave: int) -> Plan:
    """The plan for values that are logarithms themselves (exponents); see `make_plan`."""
    zeros = single_class(values)
    often = counted(values, zeros.row, zeros.column)[0]
    low = int(often.nonzero()[0].min(initial=NUM_SYMBOLS - 1)) - 1
    if often.all() and often[0] < often[-1]:
        low = 0  # of 256 values one has to be an escape
    symbols = symbols_of(values, low, 0)
    choices = [single_class(symbols)]
    if values.size and min(values.shape) > 1:
        choices.append(fit_classes(symbols, log_classes(symbols, per_octave), low))
    return cheapest(symbols, choices, low, 0)


def symbols_of(values: Int[ndarray, "rows in"], low: int, num_low_bits: int) -> UInt8[ndarray, "rows in"]:
    """Values as symbols, those outside the window as escapes."""
    symbols = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), step := max(1, CHUNK // max(1, values.shape[1]))):
        block = values[first : first + step]
        if block.dtype == np.uint8 and not num_low_bits and -1 <= low < NUM_SYMBOLS:
            shifted = block - np.uint8(low & 255)  # wraps around below the window, to no more than `low`
            outside = block <= low
            symbols[first : first + step] = np.where(outside, 0, shifted) if outside.any() else shifted
            continue
        high = (block.astype(np.int32) >> num_low_bits).astype(np.int64) - low
        symbols[first : first + step] = np.where((high > 0) & (high < NUM_SYMBOLS), high, 0)
    return symbols


def cheapest(symbols: UInt8[ndarray, "out in"], choices: list[Classes], low: int, num_low_bits: int) -> Plan:
    """The plan with the classes that cost least."""
    plans = []
    for classes in choices:
        counts = counted(symbols, classes.row, classes.column)
        plans.append(Plan(symbols.shape, num_low_bits, classes, make_tables(counts, low), counts))
    return min(plans, key=plan_bits)


def window(values: Int[ndarray, "out in"]) -> tuple[int, int]:
    """The value below the first symbol, and how many low bits are kept apart, so that hardly any value is an escape."""
    if not values.size:
        return CENTRED, 0
    sample = values.reshape(-1)[:: max(1, values.size // 2**16)]
    first, last = np.quantile(sample, [0.0005, 0.9995])
    num_low_bits = 0
    while (last - first) / 2**num_low_bits > 2 * -CENTRED - 2:
        num_low_bits += 1
    first, last = int(first) >> num_low_bits, int(last) >> num_low_bits
    if first > CENTRED and last < -CENTRED:
        return CENTRED, num_low_bits
    return (first + last) // 2 + CENTRED, num_low_bits


def lanes_and_rows(shape: tuple[int, int], path: int | None = None) -> tuple[int, int]:
    """The number of lanes of a matrix, and of its rows in a chunk; paths of a trellis are not cut."""
    num_rows, num_columns = shape
    num_chunks = max(1, round(num_rows * num_columns / CHUNK) if path is None else -(-num_rows // path))
    num_lanes = 1
    while num_lanes < MOST_LANES and 2 * num_lanes * PER_LANE * num_chunks <= num_rows * num_columns:
        num_lanes *= 2
    while num_lanes > num_rows > 0:
        num_lanes //= 2
    if path is not None:
        return num_lanes, path
    per_chunk = -(-num_rows // num_chunks)
    return num_lanes, max(1, -(-per_chunk // num_lanes) * num_lanes)


def plan_bits(plan: Plan) -> float:
    """Bits that the plan will take, all side information counted."""
    num_lanes, chunk_rows = plan.lanes_and_rows
    num_chunks = -(-plan.shape[0] // chunk_rows)
    return (
        coded_bits(plan, plan.tables) + num_chunks * (24 * num_lanes + 8) + table_bits(plan.tables) + class_bits(plan)
    )


def share_tables(plans: Mapping[str, Plan]) -> tuple[TableSet | None, set[str]]:
    """Tables that several matrices share, and which ones use them rather than their own; None where that does not pay.

    Classes are absolute scales, so that values of the same class are spread alike in all matrices of a model.
    """
    users = {name for name, plan in plans.items() if plan.tables.low == CENTRED}
    shared = None
    for _ in range(2):
        if len(users) < 2:
            return None, set()
        pooled = np.zeros((max(len(plans[name].counts) for name in users), NUM_SYMBOLS), np.int64)
        for name in users:
            pooled[: len(plans[name].counts)] += plans[name].counts
        shared = make_tables(pooled, CENTRED)
        gains = {name: own_bits(plans[name]) - coded_bits(plans[name], shared) for name in users}
        users = {name for name, gain in gains.items() if gain > 0}
    if shared is None or sum(gains[name] for name in users) < table_bits(shared):
        return None, set()
    return shared, users


def own_bits(plan: Plan) -> float:
    """Bits of the values when coded with tables of their own, these included."""
    return coded_bits(plan, plan.tables) + table_bits(plan.tables)


def coded_bits(plan: Plan, tables: TableSet) -> float:
    """Bits that the values take when coded with these tables, tables not counted."""
    costs = tables.costs if not plan.num_states or plan.num_low_bits else tables.costs_by_parity
    values = plan.counts * costs[: len(plan.counts)]
    return float(values.sum()) + plan.shape[0] * plan.shape[1] * plan.num_stored_low_bits


def table_bits(tables: TableSet) -> float:
    """Approximate bits that a set of tables takes in the file."""
    spans = [np.flatnonzero(logs[1:]) for logs in tables.logs]
    return sum(TABLE_BITS + SYMBOL_BITS * (span[-1] - span[0] + 1 if len(span) else 0) for span in spans)


def class_bits(plan: Plan) -> float:
    """Bits of naming the classes of rows and columns, about, and of what else stands in a head."""
    return sequence_bits(plan.classes.row) + sequence_bits(plan.classes.column) + 64


def sequence_bits(parts: Int[ndarray, " n"]) -> float:
    """Approximate bits that naming the classes takes."""
    often = np.bincount(parts)
    often = often[often > 0]
    if len(often) < 2:
        return 12.0
    return float((often * (np.log2(len(parts)) - np.log2(often))).sum()) + TABLE_BITS + SYMBOL_BITS * len(often) + 40
