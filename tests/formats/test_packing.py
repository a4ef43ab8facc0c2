"""Packing against a judge that writes one bit at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.formats.packing import pack, packed_width, unpack


def pack_bit_by_bit(row, bits):
    """Code j occupies bits j*b ... j*b+b-1, least significant first; the rest of the last byte is zero."""
    packed = [0] * -(-len(row) * bits // 8)
    for j, code in enumerate(row):
        for bit in range(bits):
            place = j * bits + bit
            packed[place // 8] |= (code >> bit & 1) << place % 8
    return packed


def unpack_bit_by_bit(packed, bits, num_codes):
    stream = [byte >> bit & 1 for byte in packed for bit in range(8)]
    return [sum(stream[j * bits + bit] << bit for bit in range(bits)) for j in range(num_codes)]


@st.composite
def codes(draw):
    bits = draw(st.integers(1, 8))
    num_codes = draw(st.integers(1, 67))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=num_codes, max_size=num_codes)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(codes())
def test_agrees_with_bit_by_bit(drawn):
    bits, rows = drawn
    packed = pack(torch.tensor(rows, dtype=torch.uint8), bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (len(rows), packed_width(len(rows[0]), bits))
    assert packed.tolist() == [pack_bit_by_bit(row, bits) for row in rows]
    assert unpack(packed, bits, len(rows[0])).tolist() == rows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.binary(min_size=1, max_size=40), st.data())
def test_any_bytes_unpack(bits, packed, data):
    """A file may hold anything, also in the bits after the last code."""
    num_codes = data.draw(st.integers(len(packed) * 8 // bits - 8 // bits + 1, len(packed) * 8 // bits).filter(bool))
    row = torch.tensor([list(packed)], dtype=torch.uint8)
    if packed_width(num_codes, bits) == len(packed):
        assert unpack(row, bits, num_codes).tolist() == [unpack_bit_by_bit(packed, bits, num_codes)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place(bits):
    rows = torch.arange(2**bits, dtype=torch.uint8).view(-1, 1).repeat(1, 17)
    assert torch.equal(unpack(pack(rows, bits), bits, 17), rows)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_waste(bits):
    """Eight codes fill exactly `bits` bytes, and a row never spends more than 7 bits on its end."""
    assert packed_width(8, bits) == bits
    for num_codes in range(1, 100):
        assert 0 <= 8 * packed_width(num_codes, bits) - bits * num_codes < 8


def test_rows_end_on_bytes():
    """Rows can be taken one at a time, none included."""
    rows = torch.randint(0, 8, (5, 13), dtype=torch.uint8)
    packed = pack(rows, 3)
    assert torch.equal(unpack(packed[[3, 1]], 3, 13), rows[[3, 1]])
    assert unpack(packed[:0], 3, 13).shape == (0, 13)
    assert unpack(packed[:0], 4, 10).shape == (0, 10)
