"""Integers come back as they were, in about the bits of their entropy, whichever loops did the work."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import rans_numpy
from tersor.codecs import integers, rans, rans_numba
from tersor.codecs.integers import as_matrix, decode, encode, estimate_bits, pieces_of
from tersor.codecs.plan import make_plan
from tersor.core.errors import ArtifactError

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def normal(*shape: int, sigma: float = 1.0, dtype=torch.int16) -> Tensor:
    return torch.round(sigma * torch.randn(shape)).to(dtype)


def entropy(codes: Tensor) -> float:
    """Bits of all values by their frequencies alone."""
    _, counts = codes.unique(return_counts=True)
    return float(-(counts * (counts / codes.numel()).log2()).sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (7,), (1, 50), (50, 1), (33, 65), (4, 3, 5, 5)])
def test_every_shape_and_type(shape, dtype):
    codes = normal(*shape, sigma=3.0, dtype=torch.int32).clamp(0 if dtype == torch.uint8 else -100, 100).to(dtype)
    assert same(decode(encode(codes)), codes)


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.int8, np.int16, np.int32]),
        arrays.array_shapes(min_dims=1, max_dims=3, max_side=40),
        elements=None,
    )
)
@example(np.array([2**31 - 128], np.int32))  # the last place that a table can have
@QUICK
def test_any_integers(values):
    codes = torch.from_numpy(values.copy())
    assert same(decode(encode(codes)), codes)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 4.0, 60.0, 3000.0])
def test_as_small_as_the_entropy(sigma):
    codes = normal(256, 512, sigma=sigma)
    ideal = entropy(codes) if sigma < 1000 else codes.numel() * math.log2(sigma * math.sqrt(2 * math.pi * math.e))
    assert 8 * len(encode(codes)) < max(1.012 * ideal, 0.0087 * codes.numel()) + 1200


def test_scales_of_rows_and_columns_are_used():
    """Normal codes whose scale differs by row and column: far below the entropy of all together, and within 2 % of the
    entropy given the true scales."""
    row, column = torch.exp(0.5 * torch.randn(400, 1)), torch.exp(0.3 * torch.randn(1, 800))
    sigma = 2 * row * column
    codes = torch.round(sigma * torch.randn(400, 800)).to(torch.int16)
    bits = 0.0
    for part, scale in zip(codes, sigma, strict=True):  # -log2 of the mass of each code's cell
        mass = (torch.erf((part + 0.5) / scale / 2**0.5) - torch.erf((part - 0.5) / scale / 2**0.5)).double() / 2
        bits += float(-mass.clamp(min=1e-7).log2().sum())
    stored = 8 * len(encode(codes))
    assert stored < 1.02 * bits
    assert stored < 0.95 * entropy(codes)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 500.0])
@pytest.mark.parametrize("shape", [(64, 96), (384, 384), (2000, 90)])
def test_estimate(sigma, shape):
    scale = sigma * torch.exp(0.3 * torch.randn(shape[0], 1))
    codes = torch.round(scale * torch.randn(shape)).to(torch.int16)
    stored = 8 * len(encode(codes))
    assert estimate_bits(codes) == pytest.approx(stored, rel=0.005, abs=300)


def test_outliers_are_written_out():
    codes = normal(200, 300)
    plain = len(encode(codes))
    codes[3, 5], codes[100, 7], codes[199, 299] = 32767, -32768, 900
    assert same(decode(encode(codes)), codes)
    assert len(encode(codes)) < plain + 64


def test_zeros_cost_what_their_probability_says():
    codes = torch.where(torch.rand(300, 1000) < 0.05, normal(300, 1000, sigma=4.0), 0).to(torch.int16)
    assert 8 * len(encode(codes)) < 1.02 * entropy(codes) + 1200
    nothing = torch.zeros(1000, 1000, dtype=torch.int16)
    assert same(decode(encode(nothing)), nothing)
    assert len(encode(nothing)) < 1400


def test_the_same_bytes_from_numpy(monkeypatch):
    """The compiled loops and those in numpy are one coder."""
    for shape, sigma in (((70, 50), 1.5), ((5, 9), 0.3), ((150, 60), 40.0), ((300, 300), 0.7)):
        codes = normal(*shape, sigma=sigma)
        codes[0, 0] = 3000
        values = as_matrix(codes)
        plan = make_plan(values)
        made = {}
        for loops in (rans_numba, rans_numpy):
            monkeypatch.setattr(rans, "loops", lambda loops=loops: loops)
            made[loops] = pieces_of(values, plan)
        assert made[rans_numba] == made[rans_numpy]
        assert same(decode(encode(codes)), codes)  # by numpy alone


@pytest.mark.parametrize("loops", [rans_numba, rans_numpy])
@pytest.mark.parametrize(
    ("shape", "sigma"), [((70, 150), 1.5), ((1, 90), 2.0), ((40, 1), 2.0), ((130, 64), 40.0), ((33, 20), 3000.0)]
)
def test_scaled_on_the_way(shape, sigma, loops, monkeypatch):
    """With scales the very bits that decoding and then scaling in torch gives: for escapes, low bits, single rows."""
    monkeypatch.setattr(rans, "loops", lambda: loops)
    torch.manual_seed(0)
    codes = normal(*shape, sigma=sigma)
    codes[0, 0], codes[-1, -1] = 3000, -700
    rows, columns = torch.rand(shape[0]) + 1e-3, torch.rand(shape[1]) - 0.5
    pieces = integers.Integers().encode(codes)
    parts = [memoryview(part) for part in (pieces.head, *pieces.chunks)]
    scaled = integers.Integers(scales=(rows.numpy(), columns.numpy()))
    decoding = scaled.decode(parts[0], parts[1:], torch.int16, shape)
    for task in decoding.tasks:
        task()
    assert same(decoding.tensor, codes * (rows[:, None] * columns))


def test_the_coder_step_by_step():
    """One lane against rANS as its paper has it, with whole numbers of any size."""
    codes = normal(40, 1, sigma=2.0)
    plan = make_plan(as_matrix(codes))
    pieces = pieces_of(as_matrix(codes), plan)
    tables, state, words = plan.tables, 65536, []
    classes = plan.classes.row + plan.classes.column[0]
    for value, each in zip(reversed(codes.flatten().tolist()), reversed(classes.tolist()), strict=True):
        table = tables.table_of[each]
        symbol = value - tables.low
        count, start = int(tables.counts[table, symbol]), int(tables.starts[table, symbol])
        if state >= count << 18:
            words.append(state & 65535)
            state >>= 16
        state = (state // count << 14) + state % count + start
    expected = [state >> 16, state & 65535, *reversed(words)]
    assert pieces.chunks == [b"\0" + np.array(expected, "<u2").tobytes()]


@given(data=st.data())
@QUICK
def test_damaged_bytes(data):
    """Any bytes decode to something of the declared size, or are refused."""
    whole = bytearray(encode(WHOLE))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        found = decode(bytes(whole))
    except ArtifactError:
        return
    assert found.numel() <= integers.EXPANSION * len(whole)


WHOLE = torch.round(3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))).to(torch.int16)


@pytest.mark.parametrize("keep", range(0, 60, 3))
def test_truncated_bytes(keep):
    with pytest.raises(ArtifactError):
        decode(encode(WHOLE)[:keep])


def test_no_more_memory_than_the_bytes_can_stand_for():
    """A shape of 2**50 values in a few bytes is refused before memory is taken."""
    from tersor.codecs.bits import write_varint

    forged = b"".join(map(write_varint, [2, 2, 2**25, 2**25, 4, 1, 4])) + bytes(8)
    with pytest.raises(ArtifactError, match="cannot hold 33554432 x 33554432 values"):
        decode(forged)
