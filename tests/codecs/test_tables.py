"""Tables: their counts add up, they are stored in few bits, and nothing but what a writer makes is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import rans_numpy
from tersor.codecs import rans_numba
from tersor.codecs.bits import BitReader, BitWriter, unzigzag, zigzag
from tersor.codecs.counts import LARGEST, TOTAL
from tersor.codecs.tables import MOST, make_tables, normalized, read_tables, write_tables
from tersor.core.errors import ArtifactError

counts_of = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 6), st.just(256)), elements=st.integers(0, 3) | st.integers(0, 10**7)
)


@given(counts_of)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(counts):
    tables = make_tables(counts, -128)
    out = BitWriter()
    write_tables(tables, out)
    read = read_tables(BitReader(bytes(out)))
    assert read.low == tables.low
    assert np.array_equal(read.logs, tables.logs)
    assert np.array_equal(read.table_of, tables.table_of)
    assert len(read.table_of) == len(counts)


@given(arrays.arrays(np.int64, 256, elements=st.integers(0, 113)))
@settings(deadline=None, max_examples=100)
def test_counts_add_up(logs):
    logs[0] = max(1, logs[0])
    counts = normalized(logs)
    assert counts.sum() == TOTAL
    assert ((counts > 0) == (logs > 0)).all()
    assert counts[1:].max() <= MOST


def test_an_eighth_of_an_octave_is_fine_enough():
    """Counts from stored logarithms cost less than 0.002 bits a value more than the true frequencies."""
    place = np.arange(256) - 128
    true = np.exp(-0.5 * (place / 6.0) ** 2)
    true = np.where(place == -128, 0, np.round(true / true.sum() * 10**6)).astype(np.int64)
    tables = make_tables(true[None], -128)
    share = true / true.sum()
    cost = float((true * tables.costs[0]).sum() / true.sum())
    assert cost < -(share * np.log2(np.where(share > 0, share, 1))).sum() + 0.002


def test_classes_share_a_table_unless_another_pays():
    same = np.zeros((5, 256), np.int64)
    same[:, 120:136] = 30
    assert len(make_tables(same, -128).logs) == 1
    other = same.copy()
    other[3] = 0
    other[3, 128] = 5000
    assert len(make_tables(other, -128).logs) == 3


@given(st.binary(max_size=80))
@settings(deadline=None, max_examples=200)
def test_any_bytes(data):
    try:
        tables = read_tables(BitReader(data))
    except ArtifactError:
        return
    assert (tables.counts.sum(axis=1) == TOTAL).all()
    assert tables.symbols.shape == (len(tables.logs), TOTAL)


@given(st.lists(st.tuples(st.sampled_from(["raw", "gamma"]), st.integers(0, 2**20))))
@settings(deadline=None, max_examples=50)
def test_bits(numbers):
    out = BitWriter()
    for kind, value in numbers:
        out.gamma(value) if kind == "gamma" else out.raw(value, 21)
    source = BitReader(bytes(out))
    for kind, value in numbers:
        assert (source.gamma() if kind == "gamma" else source.raw(21)) == value
    with pytest.raises(ArtifactError, match="in the middle of a number"):
        source.raw(8)


@pytest.mark.parametrize("loops", [rans_numba, rans_numpy])
@given(st.lists(st.integers(0, LARGEST), min_size=1, max_size=40), st.integers(3, 7), st.integers(0, 7), st.binary())
@settings(deadline=None, max_examples=50)
def test_logarithms_by_their_differences(loops, logs, k, place, after):
    out = BitWriter()
    out.raw(0, place)
    for log, latest in zip(logs, [0, *logs], strict=False):
        out.rice(zigzag(log - latest), k)
    num_bits = out.num_bits
    padded = np.frombuffer(bytearray(bytes(out) + after) + bytes(8), np.uint8)
    before, read = np.zeros(len(logs) + 1, np.int64), np.zeros(len(logs), np.int64)
    assert loops.read_logs(padded, place, k, 0, before, read) == num_bits
    assert read.tolist() == logs
    cut = np.frombuffer(bytearray(bytes(out)[: (num_bits - 1) // 8]) + bytes(8), np.uint8)
    assert loops.read_logs(cut, place, k, 0, before, read) == -1


@given(st.binary(max_size=60), st.integers(0, 7), st.integers(0, 1), st.integers(0, 50), st.data())
@settings(deadline=None, max_examples=200)
def test_either_loop_reads_the_same_of_any_bytes(data, k, follow, num_symbols, draw):
    padded = np.frombuffer(bytearray(data) + bytes(8), np.uint8)
    before = np.array(draw.draw(st.lists(st.integers(0, LARGEST), min_size=51, max_size=51)), np.int64)[
        : num_symbols + 1
    ]
    read = [np.zeros(num_symbols, np.int64) for _ in range(2)]
    places = [
        each.read_logs(padded, 0, k, follow, before, logs)
        for each, logs in zip((rans_numba, rans_numpy), read, strict=True)
    ]
    assert places[0] == places[1]
    assert np.array_equal(*read)


@given(st.integers(-(2**40), 2**40))
def test_zigzag(value):
    assert unzigzag(zigzag(value)) == value
