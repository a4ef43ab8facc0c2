"""Integer grids against a slow version that reads like the textbook, and what is special about them."""

import numpy as np
import pytest
import torch

from laws import odd_weights, random
from tersor.formats import FORMATS
from tersor.formats.int_group import IntGroup

GRIDS = [format for format in FORMATS.values() if isinstance(format, IntGroup)]
SMALL_GRIDS = [IntGroup(bits, 32, symmetric) for bits in (8, 6, 5, 4, 3, 2) for symmetric in (True, False)]
f32, f16 = np.float32, np.float16


def named(format):
    return format.name


def textbook_group(weights, format):
    """One group, one float32 number at a time: the scale, the zero point's code, and the weights on the grid."""
    levels = 2**format.bits
    low, high = min(weights), max(weights)
    code = None
    if not format.symmetric:
        low, high = min(low, f32(0)), max(high, f32(0))
        scale = f16(f32(high - low) / f32(levels - 1))
        code = min(max(round(float(f32(-low) / (f32(scale) or f32(1)) * f32(256 / levels))), 0), 255)
        zero_point, lowest = f32(code * levels / 256), 0
    elif format.bits == 8:
        scale, zero_point, lowest = f16(f32(max(high, -low)) / f32(127)), f32(128), 1
    else:
        scale = f16(f32(high if high > -low else low) / f32(-levels / 2))
        zero_point, lowest = f32(levels / 2), 0
    quantized = []
    for weight in weights:
        steps = f32(f32(weight) / (f32(scale) or f32(1))) + zero_point
        nearest = min(max(round(float(steps)), lowest), levels - 1)
        quantized.append(f32(f32(nearest) - zero_point) * f32(scale))
    return scale, code, quantized


@pytest.mark.parametrize("format", SMALL_GRIDS, ids=named)
@pytest.mark.parametrize(
    "label", ["gaussian", "outliers", "groups of zeros", "all positive", "where fp16 scales are coarse"]
)
def test_agrees_with_the_textbook(format, label):
    weight = odd_weights()[label]
    weight = weight[:: max(1, weight.shape[0] // 8)]
    params, quantized = format.fit(weight), format.fake_quantize(weight, format.fit(weight))
    for row in range(weight.shape[0]):
        for group, start in enumerate(range(0, weight.shape[1], 32)):
            scale, code, expected = textbook_group(weight[row, start : start + 32].numpy(), format)
            assert params["scale"][row, group].numpy() == scale
            if code is not None:
                assert params["zero_point"][row, group] == code
            assert quantized[row, start : start + 32].tolist() == expected


@pytest.mark.parametrize("format", GRIDS, ids=named)
def test_no_code_is_nearer(format):
    """Brute force over all codes of the grid."""
    for label in ("gaussian", "heavy tails", "outliers", "all positive", "huge"):
        weight = odd_weights()[label][:3]
        params = format.fit(weight)
        lowest = 1 if format.bits == 8 and format.symmetric else 0
        error = (format.fake_quantize(weight, params) - weight).abs()
        step = params["scale"].float().abs().repeat_interleave(weight.shape[1] // params["scale"].shape[1], dim=1)
        for code in range(lowest, 2**format.bits):
            other = format.dequantize(torch.full_like(weight, code), params)
            assert ((other - weight).abs() >= error - 1e-4 * step).all()


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("int8", 16 * (192 + 2)),
        ("int8-g64", 16 * (192 + 3 * 2)),
        ("int6", 16 * (144 + 2)),
        ("int5-g32-asym", 16 * (120 + 6 * 3)),
        ("int4-g64-asym", 16 * (96 + 3 * 3)),
        ("int3-g64", 16 * (72 + 3 * 2)),
        ("int2-asym", 16 * (48 + 3)),
    ],
)
def test_bytes_are_the_nominal_ones(name, num_bytes):
    """`bits` per weight, 16 for a group's scale, 8 for its zero point, and nothing else."""
    weight = random(16, 192)
    encoded = FORMATS[name].encode(weight, FORMATS[name].fit(weight))
    assert encoded.num_bytes == num_bytes
    assert encoded.bits_per_weight == 8 * num_bytes / (16 * 192)


def test_odd_rows_waste_less_than_a_byte():
    encoded = FORMATS["int3"].encode(random(5, 37), FORMATS["int3"].fit(random(5, 37)))
    assert encoded.num_bytes == 5 * (14 + 2)


@pytest.mark.parametrize("bits", [6, 5, 4, 3, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_lands_on_the_longer_end(bits, sign):
    """Below 8 bits the scale is signed, so that the extreme is code 0 whichever sign it has."""
    weight = sign * torch.linspace(-0.5, 1, 64).view(1, 64)
    format = IntGroup(bits)
    params = format.fit(weight)
    assert params["scale"].sign().item() == -sign
    assert format.quantize(weight, params)[0, -1] == 0
    torch.testing.assert_close(format.fake_quantize(weight, params)[0, -1], weight[0, -1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("group_size", [None, 32])
def test_int8_keeps_to_127(group_size):
    """int8 kernels want signed codes in -127..127, and positive scales."""
    format = IntGroup(8, group_size)
    for weight in (odd_weights()["outliers"], odd_weights()["all negative"], odd_weights()["tiny"]):
        encoded = format.encode(weight, format.fit(weight))
        assert encoded.parts["codes"].dtype is torch.int8
        assert encoded.parts["codes"].min() >= -127
        assert (encoded.parts["scale"] >= 0).all()


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_asymmetric_range_holds_zero(bits, shift):
    """A group that is far from zero keeps zero on or beside its grid, and its own ends as well."""
    weight = random(4, 64).clamp(-2, 2) + shift
    format = IntGroup(bits, 32, symmetric=False)
    params = format.fit(weight)
    step = params["scale"].float().max().item()
    assert format.fake_quantize(torch.zeros_like(weight), params).abs().max() <= step / 2
    assert (format.fake_quantize(weight, params) - weight).abs().max() <= step * 0.52
    one_sided = IntGroup(bits, None, symmetric=False)
    weight = weight - weight.amin(dim=1, keepdim=True)
    assert (one_sided.fake_quantize(torch.zeros_like(weight), one_sided.fit(weight)) == 0).all()


@pytest.mark.parametrize("format", GRIDS, ids=named)
def test_finer_grids_are_closer(format):
    """One bit more lowers the error of a gaussian weight."""
    weight = random(16, 128)
    finer = IntGroup(format.bits + 1, format.group_size, format.symmetric) if format.bits < 8 else None
    if finer:
        errors = [(grid.fake_quantize(weight, grid.fit(weight)) - weight).square().mean() for grid in (format, finer)]
        assert errors[1] < errors[0]
