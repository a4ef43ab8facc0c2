"""K-quants: ggml's own numbers, and better ones by search. The bytes are tested in tests/export/test_gguf.py."""

import numpy as np
import pytest
import torch

from laws import odd_weights, random
from tersor.core.errors import FormatError
from tersor.formats import FORMATS
from tersor.formats.k_quant import KINDS, KQuant
from tersor.methods import METHODS
from tersor.methods.stats import Stats

K_QUANTS = [KQuant(bits) for bits in KINDS]


@pytest.mark.parametrize(
    ("name", "bits"), [("q6_k", 6.5625), ("q5_k", 5.5), ("q4_k", 4.5), ("q3_k", 3.4375), ("q2_k", 2.625)]
)
def test_bytes_are_those_of_ggml(name, bits):
    weight = random(3, 512)
    assert FORMATS[name].encode(weight, FORMATS[name].fit(weight)).bits_per_weight == bits


def textbook(format, weight):
    """One block of one super-block at a time, as the format's description says, in float64."""
    size, scale_bits, symmetric = format.kind
    levels, most = 2**format.bits, 2 ** (scale_bits - 1) - 1 if symmetric else 2**scale_bits - 1
    blocks = weight.double().numpy().reshape(-1, size)

    def unit(values):
        return float(np.float16(max(map(abs, values)) / most))

    if symmetric:
        scales = [block[np.abs(block).argmax()] / (-levels / 2) for block in blocks]
        steps = [unit(scales) * np.round(s / unit(scales)) for s in scales]
        pairs = zip(blocks, steps, strict=True)
        return np.concatenate([s * np.clip(np.round(b / s), -levels / 2, levels / 2 - 1) for b, s in pairs])
    depths, heights = [max(-block.min(), 0) for block in blocks], [max(block.max(), 0) for block in blocks]
    minima = [unit(depths) * np.round(depth / unit(depths)) for depth in depths]
    full = [(d + h) / (levels - 1) for d, h in zip(depths, heights, strict=True)]
    scales = [(m + h) / (levels - 1) for m, h in zip(minima, heights, strict=True)]
    steps = [unit(full) * np.round(s / unit(full)) for s in scales]
    triples = zip(blocks, steps, minima, strict=True)
    return np.concatenate([s * np.clip(np.round((b + m) / s), 0, levels - 1) - m for b, s, m in triples])


@pytest.mark.parametrize("format", K_QUANTS, ids=lambda format: format.name)
def test_agrees_with_a_slow_version(format):
    weight = random(1, 256, seed=3)
    quantized = format.fake_quantize(weight, format.fit(weight)).numpy().flatten()
    np.testing.assert_allclose(quantized, textbook(format, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", K_QUANTS, ids=lambda format: format.name)
def test_shrink_of_a_block_leaves_the_others_alone(format):
    weight = odd_weights()["outliers"]
    size = format.kind.block_size
    shrink = torch.ones(weight.shape[0], weight.shape[1] // size)
    shrink[:, 3] = 0.6
    plain, changed = (
        format.fake_quantize(weight, format.fit(weight)),
        format.fake_quantize(weight, format.fit(weight, shrink)),
    )
    moved = (plain != changed).view(weight.shape[0], -1, size).any(-1)
    assert moved[:, 3].any()
    assert not moved[:, [0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("format", K_QUANTS, ids=lambda format: format.name)
def test_refit_never_raises_the_error_of_a_block(format):
    importance = random(512, seed=5).square()
    importance[::5] = 0
    importance[64:96] = 0
    weight = random(8, 512, seed=4)
    weight[2], weight[3, :128], weight[4] = 0, 0.7, weight[4].abs()
    params = format.fit(weight, 0.8)

    def error(params):
        return format.grouped((format.fake_quantize(weight, params) - weight).square() * importance).sum(-1)

    before, after = error(params), error(format.refit(weight, params, importance))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()


# The mean squared error that llama.cpp's own quantizer leaves on gaussian weights.
GGML = {6: 3.12e-4, 5: 1.29e-3, 4: 5.11e-3, 3: 2.26e-2, 2: 8.8e-2}


@pytest.mark.parametrize("format", K_QUANTS, ids=lambda format: format.name)
def test_search_does_about_as_well_as_ggml(format):
    weight = random(32, 1024, seed=6)
    error = (METHODS["mse"]().compress(weight, format, Stats()).decode() - weight).square().mean().item()
    assert error < 1.03 * GGML[format.bits]


@pytest.mark.parametrize("format", K_QUANTS, ids=lambda format: format.name)
def test_gptq_lowers_the_error_of_the_output(format):
    inputs = random(2048, 256, seed=7) @ (torch.eye(256) + 0.2 * random(256, 256, seed=8))
    stats, weight = Stats(second_moment=inputs.T @ inputs / len(inputs)), random(16, 256, seed=9)
    errors = [
        ((METHODS[name]().compress(weight, format, stats).decode() - weight) @ inputs.T).square().mean()
        for name in ("mse", "gptq")
    ]
    assert errors[1] < 0.8 * errors[0]


def test_overflow_names_what_overflows():
    weight = torch.full((1, 256), 3e8)
    with pytest.raises(FormatError, match=r"q4_k: a scale of .* overflows fp16"):
        FORMATS["q4_k"].fit(weight)
    with pytest.raises(FormatError, match=r"q4_k: a minimum of .* overflows fp16"):
        FORMATS["q4_k"].fit(-weight)
