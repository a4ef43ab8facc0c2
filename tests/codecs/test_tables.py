"""Tables: their counts add up, they are stored in few bits, and nothing but what a writer makes is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tersor.codecs.bits import BitReader, BitWriter, unzigzag, zigzag
from tersor.codecs.tables import MOST, TOTAL, make_tables, normalized, read_tables, write_tables
from tersor.errors import ArtifactError

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


@given(st.lists(st.tuples(st.sampled_from(["raw", "rice", "gamma"]), st.integers(0, 2**20), st.integers(16, 21))))
@settings(deadline=None, max_examples=50)
def test_bits(numbers):
    out = BitWriter()
    for kind, value, k in numbers:
        out.gamma(value) if kind == "gamma" else out.raw(value, 21) if kind == "raw" else out.rice(value, k)
    source = BitReader(bytes(out))
    for kind, value, k in numbers:
        read = {"gamma": source.gamma, "raw": lambda: source.raw(21), "rice": lambda k=k: source.rices(k, 1)[0]}
        assert read[kind]() == value
    with pytest.raises(ArtifactError, match="in the middle of a number"):
        source.raw(8)


@given(st.lists(st.integers(0, 300)), st.integers(3, 7))
def test_many_numbers_at_once(numbers, k):
    out = BitWriter()
    out.raw(5, 3)
    for number in numbers:
        out.rice(number, k)
    source = BitReader(bytes(out))
    assert source.raw(3) == 5
    assert source.rices(k, len(numbers)) == numbers
    with pytest.raises(ArtifactError, match=r"in the middle of a number|more than 40 bits"):
        source.rices(k, 8)


@given(st.integers(-(2**40), 2**40))
def test_zigzag(value):
    assert unzigzag(zigzag(value)) == value
