"""Whole numbers with a step for every row and column."""

import numpy as np
import pytest
import torch

from laws import random, same_bits
from tersor.core.errors import FormatError
from tersor.formats.coded import FINER, LARGEST, Coded, scales, steps
from tersor.formats.contract import Encoded


def odd_params(num_rows=5, num_columns=7, octave=1 / 16):
    rows, columns = random(num_rows, seed=1).exp(), 0.01 * random(num_columns, seed=2).exp()
    return scales(rows, columns, octave), rows, columns


def test_a_reader_needs_no_more_than_the_page_says():
    """In NumPy, as docs/formats.md spells it."""
    params, _, _ = odd_params()
    encoded = Coded().encode(random(5, 7), params)
    codes, row, column, scale = (encoded.parts[name].numpy() for name in ("codes", "row", "column", "scale"))
    site, row_octave, column_octave = scale[0].astype(np.float64)
    rows = np.exp2(row * row_octave).astype(np.float32)
    columns = (site * np.exp2(column * column_octave)).astype(np.float32)
    np.testing.assert_array_equal(encoded.decode().numpy(), codes.astype(np.float32) * (rows * columns))


@pytest.mark.parametrize("octave", [1, 1 / 4, 1 / 16, 1 / 256])
def test_scales_are_as_near_as_their_fraction_of_an_octave_allows(octave):
    params, rows, columns = odd_params(octave=octave)
    off = (steps(params).double() / torch.outer(rows, columns).double()).log2().abs()
    assert off.max() <= octave + 1e-6  # half of it from the row, half from the column
    assert off.max() > octave / 8


def test_no_weight_is_clipped():
    """Trained weights reach 80 deviations; here they are off by half a step like all others."""
    weight = random(64, 256)
    weight[3, 7], weight[60, 0] = 80.0, -120.0
    params = Coded().fit(weight)
    error = (Coded().fake_quantize(weight, params) - weight).abs()
    assert (error <= steps(params) / 2 * (1 + 1e-5)).all()


def test_what_no_code_reaches_is_held_at_the_end():
    params = scales(torch.ones(1), torch.tensor([1.0, 1.0]))
    assert Coded().fake_quantize(torch.tensor([[1e6, -1e6]]), params).tolist() == [[LARGEST, -LARGEST]]


@pytest.mark.parametrize("num_rows", [1, 2, 37])
def test_any_rows_are_the_same_bits_alone(num_rows):
    params, _, _ = odd_params(num_rows, 33)
    encoded = Coded().encode(random(num_rows, 33), params)
    for index in ([0], [num_rows - 1, 0], [], list(range(num_rows)) * 3):
        rows = torch.tensor(index, dtype=torch.long)
        assert same_bits(encoded.rows(rows), encoded.decode()[rows])


def test_scales_can_be_trained():
    """Exponents as floats decode to the same weight, and have gradients."""
    params, _, _ = odd_params()
    encoded = Coded().encode(random(5, 7), params)
    row, column = (params[name].float().requires_grad_() for name in ("row", "column"))
    weight = Coded().decode(Encoded(encoded.format, encoded.shape, {**encoded.parts, "row": row, "column": column}))
    assert same_bits(weight.detach(), encoded.decode())
    weight.square().sum().backward()
    # d/de of 2^(e o) is o log(2) times itself.
    expected = 2 * np.log(2) / 16 * weight.detach().square()
    torch.testing.assert_close(row.grad, expected.sum(1, keepdim=True))
    torch.testing.assert_close(column.grad, expected.sum(0, keepdim=True))


def test_finer_exponents_are_the_same_scales():
    params, _, _ = odd_params()
    finer = dict(params)
    for part in Coded().trainable_parts.values():
        finer |= part.prepared(finer)
    assert same_bits(steps(finer), steps(params))
    for part in ("row", "column"):
        assert finer[part].dtype is torch.int16
        assert torch.equal(finer[part], FINER * params[part])


def test_a_weight_at_the_end_of_float32_is_refused():
    with pytest.raises(FormatError, match=r"coded: the largest weight 3.4e\+38 overflows when it is rounded"):
        Coded().fit(torch.full((2, 2), 3.4e38))
