"""Columns on the paths of a trellis: a bit less a value, the same values back, whichever loops did the work."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rans_numpy
from golden.container.write_container import bell, on_paths
from tersor.codecs import integers, rans, rans_numba
from tersor.codecs.bits import write_varint, zigzag
from tersor.codecs.integers import EXPANSION, Integers, as_matrix, estimate_bits
from tersor.codecs.plan import best_plan, make_plan, plan_bits
from tersor.codecs.trellis import Trellis
from tersor.core.errors import ArtifactError
from tersor.formats.trellis import POLYNOMIALS, follows, num_states_of

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def decoded(pieces, shape, **how):
    head, *chunks = (memoryview(part) for part in (pieces.head, *pieces.chunks))
    decoding = Trellis(**how).decode(head, chunks, torch.int16, shape)
    for task in decoding.tasks:
        task()
    return decoding.tensor


def paths(rows=96, columns=70, spread=2.0, num_states=16, seed=0):
    """Codes of any kind on the paths of a trellis, some of them far away."""
    halves = torch.round(spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    halves[rows // 2, columns // 3], halves[-1, -1] = 3000, -4001
    return on_paths(halves.long(), num_states)


@pytest.mark.parametrize("num_states", list(POLYNOMIALS))
@pytest.mark.parametrize(("rows", "columns"), [(2, 40), (33, 65), (64, 3), (700, 1), (1100, 9)])
def test_the_same_values_back(num_states, rows, columns):
    """The parity checks of the golden file are Ungerboeck's, written out; ours is a shift register."""
    codes = paths(rows, columns, num_states=num_states)
    assert follows(codes.numpy(), num_states)
    if rows > 16:  # less says nothing
        assert num_states_of(codes.numpy()) == num_states
        assert torch.equal(decoded(Trellis().encode(codes), codes.shape), codes)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 40.0, 300.0])
def test_a_bit_less_for_each_value(spread):
    """Of wide values the tables tell nothing of the lowest bit, and all of it is saved; so are low bits kept apart."""
    codes = paths(600, 200, spread)
    stored, plain = 8 * Trellis().encode(codes).num_bytes, 8 * Integers().encode(codes).num_bytes
    assert plain - stored == pytest.approx(codes.numel(), rel=0.05)
    assert estimate_bits(codes) == pytest.approx(stored, rel=0.01)


def test_every_other_matrix_is_coded_as_before():
    codes = paths(300, 40)
    for other in (codes + 1, codes + (torch.arange(12_000).reshape(300, 40) == 11_000), codes.flip(0), codes.int()):
        values = as_matrix(other)
        assert best_plan(values).num_states == 0
        assert plan_bits(best_plan(values)) == plan_bits(make_plan(values))
    with pytest.raises(ValueError, match="no trellis"):
        Trellis().encode(codes + 1)
    assert best_plan(np.zeros((40, 40), np.int16)).num_states == 0
    assert best_plan(np.empty((0, 4), np.int16)).num_states == 0


def test_the_same_bytes_from_numpy(monkeypatch):
    for codes in (paths(70, 50, 1.5), paths(20, 9, 0.3, 4), paths(540, 20, 40.0, 256), paths(600, 20, 500.0)):
        made = {}
        for loops in (rans_numba, rans_numpy):
            monkeypatch.setattr(rans, "loops", lambda loops=loops: loops)
            made[loops] = Trellis().encode(codes)
            assert torch.equal(decoded(made[loops], codes.shape), codes)
        assert made[rans_numba] == made[rans_numpy]


@pytest.mark.parametrize("loops", [rans_numba, rans_numpy])
@pytest.mark.parametrize("spread", [1.5, 400.0])
def test_scaled_on_the_way(loops, spread, monkeypatch):
    monkeypatch.setattr(rans, "loops", lambda: loops)
    codes, rows, columns = paths(70, 90, spread), torch.rand(70) + 1e-3, torch.rand(90) - 0.5
    scaled = decoded(Trellis().encode(codes), codes.shape, scales=(rows.numpy(), columns.numpy()))
    assert torch.equal(scaled, codes * (rows[:, None] * columns))


def test_chunks_decode_by_themselves():
    codes = paths(1300, 30)
    pieces = Trellis().encode(codes)
    assert len(pieces.chunks) == 3
    decoding = Trellis().decode(memoryview(pieces.head), [*map(memoryview, pieces.chunks)], torch.int16, codes.shape)
    decoding.tasks[1]()
    assert decoding.rows[1] == slice(512, 1024)
    assert torch.equal(decoding.tensor[512:1024], codes[512:1024])


WHOLE = paths(40, 30, 2.0, 8)
PIECES = Trellis().encode(WHOLE)


@given(data=st.data())
@QUICK
def test_damaged_bytes(data):
    """Any bytes decode to codes on paths, or are refused."""
    head, chunk = bytearray(PIECES.head), bytearray(PIECES.chunks[0])
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([head, chunk]))
        at = data.draw(st.integers(0, len(part) - 1))
        part[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    shape = data.draw(st.sampled_from([(40, 30), (30, 40), (513, 2), (1, 30)]))
    for loops in (rans_numba, rans_numpy):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rans, "loops", lambda loops=loops: loops)
            try:
                found = decoded(integers.Pieces(bytes(head), [bytes(chunk)]), shape)
            except ArtifactError:
                continue
        assert found.numel() <= EXPANSION * (len(head) + len(chunk))


@pytest.mark.parametrize("first", [0b1, 0b010, 0xFF, 0])
def test_no_such_trellis(first):
    """The first number of a head is the logarithm of the states."""
    with pytest.raises(ArtifactError):
        decoded(integers.Pieces(bytes([first, *PIECES.head[1:]]), PIECES.chunks), WHOLE.shape)


def test_an_escape_off_the_path_is_refused():
    """A value that is written out says whether it is odd, and its path says so too."""
    codes = on_paths(bell(200, 60, 2), 8)
    codes[20, 10] += 4 * 900
    pieces = Trellis().encode(codes)
    value = int(codes[20, 10])
    right, wrong = (b"\1" + write_varint(zigzag(each)) for each in (value, value + 1))
    assert pieces.chunks[0].startswith(right)
    forged = integers.Pieces(pieces.head, [wrong + pieces.chunks[0][len(right) :]])
    for loops in (rans_numba, rans_numpy):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rans, "loops", lambda loops=loops: loops)
            with pytest.raises(ArtifactError, match="do not end where they should"):
                decoded(forged, codes.shape)
