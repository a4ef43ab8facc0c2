"""Frequency tables: how probable every symbol is, in whole numbers that both sides compute alike.

A table gives each of 256 symbols a count; all counts add up to `2**BITS`. Symbol 0 is the escape, after which a value
is written out. In the file a count is the logarithm of a weight in steps of an eighth of an octave, which costs about
0.0005 bits per coded value against exact counts; neighbouring symbols and neighbouring tables have similar ones, and
only differences are written (Rice codes).

The classes of a set are numbered upwards from 0, and neighbouring ones share a table where the values it saves are not
worth its own bytes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int, Int64, UInt8, UInt32
from numpy import ndarray

from tersor.codecs.bits import LONGEST, BitReader, BitWriter, unzigzag, zigzag
from tersor.codecs.counts import BITS, LARGEST, STEPS, TOTAL
from tersor.codecs.loops import loops
from tersor.core.errors import ArtifactError

NUM_SYMBOLS = 256
# No symbol is so likely that a value takes less than 1/128 bits: a file cannot ask for more than 1024 values per byte.
MOST = TOTAL - TOTAL * 23 // 4096
POWERS = np.array([4096, 4467, 4871, 5312, 5793, 6317, 6889, 7512])  # 4096 * 2 ** (step / 8)
TABLE_BITS, SYMBOL_BITS = 24, 4.5  # of a stored table, about
ESCAPE_BITS = 12  # of a value that is written out, about
MAX_TABLES, MAX_CLASSES = 256, 1024


@dataclass(frozen=True, eq=False)
class TableSet:
    """Tables, and which classes share them.

    Attributes:
        low: the value of symbol 1 is `low + 1`.
        logs: of each table's weights, as they are stored: 0 for a symbol it leaves out, else 1 plus eighths of an
            octave, `[table, symbol]`.
        table_of: number of the table of each class.
    """

    low: int
    logs: Int[ndarray, "table symbol"]
    table_of: Int[ndarray, " class"]

    @cached_property
    def counts(self) -> UInt32[ndarray, "table symbol"]:
        """The counts of every symbol, out of `TOTAL`."""
        return normalized(self.logs)

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """The lowest and the highest value that some table holds, without escapes; None if there is none."""
        present = np.flatnonzero(self.logs[:, 1:].any(axis=0)) + 1 + self.low
        return (int(present[0]), int(present[-1])) if len(present) else None

    def within(self, least: int, most: int) -> bool:
        """True if every value of every table lies between two numbers."""
        return self.span is None or least <= self.span[0] <= self.span[1] <= most

    @cached_property
    def starts(self) -> UInt32[ndarray, "table symbol"]:
        """Counts of all symbols before each one."""
        return (np.cumsum(self.counts, axis=1) - self.counts).astype(np.uint32)

    @cached_property
    def spans(self) -> UInt32[ndarray, "table symbol"]:
        """Count and start in one number, as a decoder wants them."""
        return self.counts | (self.starts << np.uint32(16))

    @cached_property
    def symbols(self) -> UInt8[ndarray, "table slot"]:
        """The symbol at each of `TOTAL` slots."""
        symbols = np.arange(NUM_SYMBOLS, dtype=np.uint8)
        return np.stack([np.repeat(symbols, row) for row in self.counts])

    @cached_property
    def by_parity(self) -> "TableSet":
        """Each table twice, for values that are known to be even, then for odd ones; escapes are in both. Classes have
        the numbers of the even ones."""
        logs = np.repeat(self.logs, 2, axis=0)
        odd = (np.arange(NUM_SYMBOLS) + self.low) & 1
        for parity in (0, 1):
            logs[parity::2, 1:][:, odd[1:] != parity] = 0
        return TableSet(self.low, logs, 2 * self.table_of)

    @cached_property
    def symbol_pairs(self) -> UInt8[ndarray, "table slot two"]:
        """Tables like `symbols`, of an even value and of an odd one side by side."""
        by_parity = self.by_parity.symbols.reshape(-1, 2, TOTAL)
        return np.ascontiguousarray(by_parity.transpose(0, 2, 1))

    @cached_property
    def costs(self) -> Float32[ndarray, "class symbol"]:
        """Bits of every symbol in every class; an escape with the value after it."""
        bits = BITS - np.log2(np.maximum(self.counts, 1))
        bits[:, 0] += ESCAPE_BITS
        return np.where(self.counts == 0, bits[:, :1], bits)[self.table_of].astype(np.float32)

    @cached_property
    def costs_by_parity(self) -> Float32[ndarray, "class symbol"]:
        """Costs in bits like `costs`, for a decoder that knows if a value is even or odd."""
        known = self.by_parity
        odd = replace(known, table_of=known.table_of + 1)
        return np.where((np.arange(NUM_SYMBOLS) + self.low) & 1, odd.costs, known.costs)


def make_tables(counts: Int[ndarray, "class symbol"], low: int) -> TableSet:
    """The set that codes values as often as counted in the fewest bits, its own included."""
    groups = merged(counts)
    logs = np.stack([stored_logs(counts[first:end].sum(axis=0)) for first, end in groups])
    table_of = np.concatenate([np.full(end - first, i, np.int32) for i, (first, end) in enumerate(groups)])
    return TableSet(low, logs, table_of)


def merged(counts: Int[ndarray, "class symbol"]) -> list[tuple[int, int]]:
    """Runs of neighbouring classes that share a table, `(first, end)`."""
    runs = [(i, i + 1) for i in range(len(counts))]
    sums = [counts[i].astype(np.float64) for i in range(len(counts))]
    bits = [run_bits(total) for total in sums]
    gains = [bits[i] + bits[i + 1] - run_bits(sums[i] + sums[i + 1]) for i in range(len(runs) - 1)]
    while gains and (max(gains) >= 0 or len(runs) > MAX_TABLES):
        i = int(np.argmax(gains))
        sums[i] = sums[i] + sums[i + 1]
        runs[i] = (runs[i][0], runs[i + 1][1])
        bits[i] = run_bits(sums[i])
        del sums[i + 1], runs[i + 1], bits[i + 1], gains[i]
        for near in (i - 1, i):
            if 0 <= near < len(gains):
                gains[near] = bits[near] + bits[near + 1] - run_bits(sums[near] + sums[near + 1])
    return runs


def run_bits(counts: Float[ndarray, " symbol"]) -> float:
    """Bits of values counted so, under a table of their own, and of that table."""
    total, present = counts.sum(), np.flatnonzero(counts)
    if total == 0:
        return 0.0
    entropy = total * np.log2(total) - (counts[present] * np.log2(counts[present])).sum()
    return float(entropy) + TABLE_BITS + SYMBOL_BITS * (present[-1] - present[0] + 1)


def stored_logs(counts: Int[ndarray, " symbol"]) -> Int[ndarray, " symbol"]:
    """The logarithms by which a table is stored: 0 for a symbol left out, else 1 plus eighths of an octave."""
    total = max(1, int(counts.sum()))
    share = counts * (TOTAL / total)
    # A symbol of its own takes a slot from all others, 1.44 bits in total per slot and turn; an escape costs its value.
    kept = (counts > 0) & (share * ESCAPE_BITS > 1.5)
    kept[0] = True
    escapes = counts[0] + counts[~kept].sum()
    share = np.where(kept, share, 0)
    share[0] = escapes * (TOTAL / total)
    logs = 1 + np.rint(STEPS * np.log2(np.maximum(share, 1))).astype(np.int64)
    return np.where(kept, np.minimum(logs, LARGEST), 0)


def normalized(logs: Int[ndarray, "*table symbol"]) -> UInt32[ndarray, "*table symbol"]:
    """Counts that add up to `TOTAL`, in whole numbers only. The most frequent symbol takes what rounding leaves.

    >>> counts = normalized(np.array([1, 90, 98] + 253 * [0]))
    >>> counts[:4].tolist(), int(counts.sum())
    ([3, 5460, 10921, 0], 16384)
    """
    steps = np.maximum(logs.reshape(-1, logs.shape[-1]).astype(np.int64) - 1, 0)
    present = (logs > 0).reshape(steps.shape)
    weights = np.where(present, POWERS[steps % STEPS] << (steps // STEPS), 0)
    free = TOTAL - present.sum(axis=1, keepdims=True)
    counts = np.where(present, 1 + weights * free // weights.sum(axis=1, keepdims=True), 0)
    table, largest = np.arange(len(counts)), counts.argmax(axis=1)
    counts[table, largest] += TOTAL - counts.sum(axis=1)
    beyond = np.where(largest > 0, np.maximum(counts[table, largest] - MOST, 0), 0)
    counts[table, largest] -= beyond
    counts[:, 0] += beyond
    return counts.astype(np.uint32).reshape(logs.shape)


def write_tables(tables: TableSet, out: BitWriter) -> None:
    """Append a set: its lowest value, how many classes each table serves, and each table."""
    out.gamma(zigzag(tables.low))
    out.gamma(len(tables.logs) - 1)
    before = np.zeros(NUM_SYMBOLS, np.int64)
    for i, logs in enumerate(tables.logs):
        out.gamma(int((tables.table_of == i).sum()) - 1)
        write_table(logs, before, out)
        before = logs


def write_table(logs: Int[ndarray, " symbol"], before: Int[ndarray, " symbol"], out: BitWriter) -> None:
    """Append one table: the escape's logarithm, the symbols it spans, and each one's difference to what is expected."""
    present = np.flatnonzero(logs[1:]) + 1
    first, end = (int(present[0]), int(present[-1]) + 1) if len(present) else (1, 1)
    out.raw(int(logs[0]), 7)
    out.raw(first - 1, 8)
    out.raw(end - first, 8)
    choices = []
    for follow in (0, 1):
        expected = guesses(logs, before, first, end, follow)
        steps = [zigzag(log - guess) for log, guess in zip(logs[first:end].tolist(), expected, strict=True)]
        usable = [k for k in range(8) if max(steps, default=0) >> k < LONGEST]
        choices += [(sum((step >> k) + 1 + k for step in steps), follow, k, steps) for k in usable]
    _, follow, k, steps = min(choices)
    out.raw(follow, 1)
    out.raw(k, 3)
    for step in steps:
        out.rice(step, k)


def guesses(logs: Int[ndarray, " symbol"], before: Int[ndarray, " symbol"], first: int, end: int, follow: int) -> list:
    """The prediction of each logarithm from those already decoded.

    It is the logarithm of the symbol before; with `follow`, the step between the two in the previous table is added.
    """
    if not follow:
        return [0, *logs[first : end - 1].tolist()][: end - first]
    later = np.maximum(0, logs[first : end - 1] + before[first + 1 : end] - before[first : end - 1])
    return [*before[first : min(first + 1, end)].tolist(), *later.tolist()]


def read_tables(source: BitReader) -> TableSet:
    """The inverse of `write_tables`. Raises ArtifactError for what no writer makes."""
    low = unzigzag(source.gamma())
    num_tables = source.gamma() + 1
    if num_tables > MAX_TABLES or not -(2**31) <= low <= 2**31 - NUM_SYMBOLS:
        raise ArtifactError(f"{num_tables} tables from the value {low} on; at most {MAX_TABLES} can be")
    table_of: list[int] = []
    rows, before = [], np.zeros(NUM_SYMBOLS, np.int64)
    for i in range(num_tables):
        num_classes = source.gamma() + 1
        if len(table_of) + num_classes > MAX_CLASSES:
            raise ArtifactError(f"more than {MAX_CLASSES} classes")
        table_of += [i] * num_classes
        before = read_table(before, source)
        rows.append(before)
    return TableSet(low, np.stack(rows), np.array(table_of, np.int32))


def read_table(before: Int64[ndarray, " symbol"], source: BitReader) -> Int64[ndarray, " symbol"]:
    """The inverse of `write_table`: the logarithms of all symbols."""
    logs = np.zeros(NUM_SYMBOLS, np.int64)
    logs[0] = source.raw(7)
    first = source.raw(8) + 1
    end = first + source.raw(8)
    follow, k = source.raw(1), source.raw(3)
    if end > NUM_SYMBOLS or not 1 <= logs[0] <= LARGEST:
        raise ArtifactError(f"a table of the symbols {first} to {end - 1}, its escape at {logs[0]}")
    place = loops().read_logs(source.padded, source.place, k, follow, before[first - 1 : end], logs[first:end])
    if place < 0:
        raise ArtifactError(
            f"the logarithms of the symbols {first} to {end - 1}: they end too early, or leave 0 to {LARGEST}"
        )
    source.place = place
    return logs
