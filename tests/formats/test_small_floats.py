"""NF4, FP8, MXFP4 and NVFP4 against slow versions, against bitsandbytes, and what is special about them."""

import math

import bitsandbytes.functional as functional
import numpy as np
import pytest
import torch

from laws import odd_weights, random
from tersor.formats import FORMATS
from tersor.formats.contract import Encoded
from tersor.formats.mx import E2M1
from tersor.formats.nf4 import NORMAL_FLOAT, Nf4, Nf4Double, dynamic_levels

E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("label", ["gaussian", "outliers", "groups of zeros", "tiny", "odd columns"])
def test_mxfp4_agrees_with_the_standard(label):
    """OCP Microscaling 1.0, 6.3: one block, one number at a time."""
    weight, format = odd_weights()[label], FORMATS["mxfp4"]
    encoded = format.encode(weight, format.fit(weight))
    decoded = encoded.decode()
    for row in range(weight.shape[0]):
        for block, start in enumerate(range(0, weight.shape[1], 32)):
            values = weight[row, start : start + 32].tolist()
            largest = max(map(abs, values))
            exponent = math.floor(math.log2(largest)) - 2 if largest else -126
            assert encoded.parts["scale"][row, block] == exponent + 127
            expected = [math.copysign(nearest_even(abs(v) / 2**exponent), v) * 2**exponent for v in values]
            assert decoded[row, start : start + 32].tolist() == expected


def nearest_even(value):
    """The nearest E2M1 magnitude; halfway, the one whose code is even."""
    return E2M1_VALUES[min(range(8), key=lambda code: (abs(value - E2M1_VALUES[code]), code % 2))]


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(E2M1.sorted[E2M1.nearest(ties).int()], even)
    assert torch.equal(E2M1.sorted[E2M1.nearest(-ties).int()], -even)
    away = torch.nextafter(ties, torch.tensor(9.0))
    assert E2M1.sorted[E2M1.nearest(away).int()].tolist() == E2M1_VALUES[1:]


def test_nvfp4_scales():
    """The largest weight becomes 6 up to the rounding of E4M3; the scale of the tensor is a power of two."""
    format = FORMATS["nvfp4"]
    for weight in (random(8, 64), 1e-6 * random(8, 64), odd_weights()["outliers"], torch.zeros(2, 32)):
        params = format.fit(weight)
        assert math.frexp(params["tensor_scale"].item())[0] == 0.5
        wide = format.fit(weight, 1.5)
        assert wide["scale"].float().max() <= 448
        reach = format.grouped(weight).abs().amax(-1)
        torch.testing.assert_close(6 * format.scale(params), reach, rtol=1 / 16, atol=reach.max().item() * 2**-17)
        torch.testing.assert_close(4 * format.scale(wide), reach, rtol=1 / 16, atol=reach.max().item() * 2**-17)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2", "fp8-e4m3-tensor", "fp8-e5m2-tensor"])
def test_fp8_rounds_to_the_nearest_value_to_even(name):
    format, weight = FORMATS[name], odd_weights()["heavy tails"]
    params = format.fit(weight)
    values = torch.arange(256, dtype=torch.uint8).view(format.dtype).float()
    values = values[values.isfinite()].unique()
    steps = weight / params["scale"].float()
    error = (format.fake_quantize(weight, params) / params["scale"].float() - steps).abs()
    least = (steps.unsqueeze(-1) - values).abs().amin(-1)
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-4)
    assert (params["scale"].shape == (1, 1)) == format.per_tensor


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.5), ("nf4-dq", 4.125 + 40 / 65536), ("fp8-e4m3", 8 + 16 / 512), ("mxfp4", 4.25), ("nvfp4", 4.5)],
)
def test_bits_are_the_nominal_ones(name, bits):
    weight = random(128, 512)
    assert FORMATS[name].encode(weight, FORMATS[name].fit(weight)).bits_per_weight == pytest.approx(bits, abs=2e-3)


def test_nf4_levels_are_quantiles_of_a_gaussian():
    """QLoRA, appendix E: eight quantiles above zero, seven below, scaled to one."""
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
    torch.testing.assert_close(NORMAL_FLOAT.sorted.double(), levels.double(), rtol=0, atol=1e-6)


def test_double_quantization_costs_little():
    weight = random(64, 512)
    errors = [(f.fake_quantize(weight, f.fit(weight)) - weight).square().mean() for f in (Nf4Double(), Nf4())]
    assert errors[0] < 1.01 * errors[1]


def test_scales_of_either_sign():
    """A negative scale turns the levels around: the longer half is then on the other side."""
    weight = random(4, 64)
    for format in (Nf4(), Nf4Double()):
        params = format.fit(weight, -1.0)
        assert torch.equal(format.encode(weight, params).decode(), format.fake_quantize(weight, params))
        torch.testing.assert_close(
            format.fake_quantize(weight, params), -format.fake_quantize(-weight, format.fit(weight)), atol=0.05, rtol=0
        )


@pytest.mark.parametrize("shape", [(64, 576), (5, 64), (3, 1536)])
def test_bitsandbytes_reads_and_writes_the_same(shape):
    """Its bytes of plain NF4 are ours, and it decodes ours, double quantization included, to our weights."""
    assert torch.equal(dynamic_levels(), functional.create_dynamic_map(signed=True))
    weight = 0.02 * random(*shape) * (1 + random(*shape, seed=1).square())
    for format in (Nf4(), Nf4Double()):
        double = isinstance(format, Nf4Double)
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
        theirs = {"codes": packed.view(shape[0], -1), "absmax": state.absmax.view(shape[0], -1)}
        if double:
            theirs |= {"nested_absmax": state.state2.absmax, "offset": state.offset.view(1)}
        decoded = functional.dequantize_4bit(packed, state)
        assert torch.equal(Encoded(format, shape, theirs).decode(), decoded)
        ours = format.encode(weight, format.fit(weight))
        if not double:
            assert all(torch.equal(ours.parts[name], theirs[name]) for name in theirs)
        packed.copy_(ours.parts["codes"].view_as(packed))
        state.absmax.copy_(ours.parts["absmax"].view(-1))
        if double:
            state.state2.absmax.copy_(ours.parts["nested_absmax"])
            state.offset.copy_(ours.parts["offset"].view(()))
        assert torch.equal(functional.dequantize_4bit(packed, state), ours.decode())


def test_dynamic_levels():
    levels = dynamic_levels().double().numpy()
    assert len(levels) == 256
    assert (np.diff(levels) > 0).all()
    assert {0.0, 1.0} <= set(levels)
    np.testing.assert_allclose(
        levels[128:136], [5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5, 4.375e-5, 6.625e-5, 8.875e-5, 1.5625e-4]
    )
