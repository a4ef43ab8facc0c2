"""Floats come back bit for bit, NaN payloads and signed zeros included, and trained ones as small as promised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import CODECS
from tersor.codecs.classes import LARGEST_PART, MAX_PART, Classes, fit_classes
from tersor.codecs.contract import Pieces
from tersor.codecs.floats import SPLITS, Floats
from tersor.core.errors import ArtifactError


def decoded(pieces: Pieces, tensor: Tensor) -> Tensor:
    chunks = [memoryview(chunk) for chunk in pieces.chunks]
    decoding = Floats().decode(memoryview(pieces.head), chunks, tensor.dtype, tuple(tensor.shape))
    for task in decoding.tasks:
        task()
    return decoding.tensor


def same(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", SPLITS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 9), (40, 30), (3, 4, 5)])
def test_any_bits(dtype, shape):
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.reshape(-1).view(dtype).reshape(shape)
    assert same(decoded(Floats().encode(tensor), tensor), tensor)


@pytest.mark.parametrize("dtype", SPLITS)
def test_special_values(dtype):
    if dtype == torch.float8_e4m3fn:
        values = torch.tensor([0.0, -0.0, float("nan"), 448.0, -448.0, 2**-9])
    else:
        values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 2**-14])
    tensor = values.repeat(50).to(dtype)
    assert same(decoded(Floats().encode(tensor), tensor), tensor)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.665), (torch.float32, 0.835), (torch.float16, 0.85)])
def test_trained_like_weights(dtype, share):
    """The exponents of normal weights take 2.6 bits; rows of their own scale take no more."""
    weight = 0.05 * torch.exp(0.3 * torch.randn(400, 1)) * torch.randn(400, 500)
    tensor = weight.to(dtype)
    assert Floats().encode(tensor).num_bytes < share * tensor.nbytes


def test_zero_bytes_of_the_mantissa_are_not_stored():
    narrow = torch.randn(200, 300).bfloat16()
    assert Floats().encode(narrow.float()).num_bytes < Floats().encode(narrow).num_bytes + 8


def test_numbers_that_came_from_half_precision_take_no_more():
    """All but three bits of the second byte are zero, and the lowest byte is."""
    half = 0.05 * torch.randn(400, 500).half()
    assert Floats().encode(half.float()).num_bytes < 1.01 * Floats().encode(half).num_bytes


def test_rows_that_were_never_trained_are_told_from_the_others():
    """Most low bytes of the mantissa are random; those of some rows came from half precision."""
    weight = torch.randn(3000, 64)
    random = Floats().encode(weight)
    weight[:300] = weight[:300].half().float()
    pieces = Floats().encode(weight)
    assert same(decoded(pieces, weight), weight)
    assert pieces.num_bytes < random.num_bytes - 0.8 * 300 * 64 * 13 / 8


def test_classes_far_apart_stay_within_what_a_file_can_hold():
    """Rows of zeros are as far from others as classes can be."""
    values = np.random.default_rng(0).integers(0, 256, (300, 200)).astype(np.uint8)
    guess = Classes(np.full(300, MAX_PART, np.int32), np.full(200, 6, np.int32))
    classes = fit_classes(values, guess, -1)
    assert max(classes.row.max(), classes.column.max()) <= LARGEST_PART
    weight = torch.randn(400, 500)
    weight[:3] = 0
    assert same(decoded(Floats().encode(weight), weight), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (40, 30), (700, 500)])
def test_few_mantissas(dtype, shape):
    tensor = torch.randint(-20, 20, shape).to(dtype) / 7
    pieces = Floats().encode(tensor)
    assert same(decoded(pieces, tensor), tensor)
    if tensor.numel() > 1000:
        assert pieces.head[0] >> 3  # coded


@pytest.mark.parametrize("whole", ["random", "few"])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_damaged_bytes(whole, data):
    original = {"random": WHOLE, "few": FEW}[whole]
    pieces = Floats().encode(original)
    head, chunk = bytearray(pieces.head), bytearray(pieces.chunks[0])
    hit = data.draw(st.sampled_from([head, chunk]))
    at = data.draw(st.integers(0, len(hit) - 1))
    hit[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        found = decoded(Pieces(bytes(head), [bytes(chunk)]), original)
    except ArtifactError:
        return
    assert found.shape == original.shape


WHOLE = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
FEW = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).half().float()


def test_the_table():
    assert list(CODECS) == ["raw", "integers", "trellis", "floats"]
    with pytest.raises(ArtifactError, match="which takes 24"):
        CODECS["raw"].decode(memoryview(b""), [memoryview(bytes(23))], torch.float32, (2, 3))
