"""Low rank: the nearest product, factors that fp16 can hold, and a correction on top of integers."""

import pytest
import torch

from laws import random
from tersor.core.errors import FormatError
from tersor.formats.contract import Encoded
from tersor.formats.int_group import IntGroup
from tersor.formats.lowrank import Corrected, LowRank


def product_of_rank(rank, num_rows=12, num_columns=20):
    return random(num_rows, rank, seed=1) @ random(rank, num_columns, seed=2)


@pytest.mark.parametrize("rank", [0, 1, 3, 12])
def test_fit_finds_the_weights_own_rank(rank):
    weight = product_of_rank(rank)
    encoded = LowRank().encode(weight, LowRank().fit(weight))
    assert encoded.parts["left"].shape == (12, rank)
    assert encoded.num_bytes == 2 * rank * (12 + 20)
    torch.testing.assert_close(encoded.decode(), weight, rtol=0, atol=2e-3 * weight.abs().max().item())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_product_of_that_rank_is_closer(rank):
    """Eckart-Young: the error is the singular values left out."""
    weight = random(12, 20)
    error = LowRank().fake_quantize(weight, LowRank().fit(weight, rank)) - weight
    left_out = torch.linalg.svdvals(weight)[rank:].square().sum()
    assert error.square().sum() <= left_out * (1 + 1e-4)


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e4, 1e7])
def test_factors_share_the_size(size):
    """Each pair reaches equally far, so weights from 1e-7 to 1e7 keep fp16's precision."""
    weight = size * product_of_rank(3)
    params = LowRank().fit(weight, 3)
    left, right = params["left"].float().abs().amax(0), params["right"].float().abs().amax(1)
    torch.testing.assert_close(left, right, rtol=2e-3, atol=0)
    error = (LowRank().fake_quantize(weight, params) - weight).abs().max()
    assert error <= 2e-3 * weight.abs().max()


def test_factors_that_do_not_multiply_are_refused():
    parts = LowRank().fit(random(6, 8), 4)
    with pytest.raises(FormatError, match=r"^lowrank: factors of \(6, 4\) and \(3, 8\) do not multiply"):
        LowRank().decode(Encoded(LowRank(), (6, 8), {**parts, "right": parts["right"][:3]}))


@pytest.mark.parametrize("format", [LowRank(), Corrected(IntGroup(4, 64))], ids=lambda format: format.name)
def test_overflow_names_the_format(format):
    with pytest.raises(FormatError, match=f"^{format.name.replace('+', '[+]')}: .*overflows fp16"):
        format.fit(1e12 * random(3, 64))


def test_a_correction_is_added_to_the_base():
    format, weight = Corrected(IntGroup(2, 64)), random(8, 96)
    base = format.base.encode(weight, format.base.fit(weight))
    factors = LowRank().fit(weight - base.decode(), 2)
    encoded = format.join(base, factors)
    torch.testing.assert_close(encoded.decode(), base.decode() + LowRank().fake_quantize(weight, factors))
    assert encoded.num_bytes == base.num_bytes + 2 * 2 * (8 + 96)


def test_snap_looks_for_the_nearest_codes_under_the_correction():
    """Not the base's own nearest: the correction shifts every grid."""
    format, weight = Corrected(IntGroup(3, 64)), random(8, 64)
    params = format.base.fit(weight)
    params |= LowRank().fit(random(8, 64, seed=3), 1)
    quantized = format.fake_quantize(weight, params)
    shift = LowRank().fake_quantize(weight, {"left": params["left"], "right": params["right"]})
    step = params["scale"].float().abs()
    inside = ((weight - shift).abs() <= 3 * step).float()
    assert inside.mean() > 0.5
    assert ((quantized - weight).abs() * inside <= 0.501 * step).all()
