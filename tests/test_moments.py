"""Moments against numpy, and the inputs of convolutions against torch's unfold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laws import random
from tersor.calibration.moments import CHUNK, SAMPLE, Moments, inputs_of
from tersor.formats import FORMATS
from tersor.methods.stats import Stats
from tersor.nn.packed import Fold, PackedConv, PackedWeight, pack_layer

ALL = frozenset({"second_moment", "cross_moment", "mean", "largest", "sample"})


def close(found, wanted, tolerance=1e-4):
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("num_tokens", [1, 100, CHUNK + 1])
def test_moments_are_numpys(num_tokens):
    x = random(num_tokens, 12) + 1
    original = x + 0.1 * random(num_tokens, 12, seed=1)
    moments = Moments(12, ALL)
    third = num_tokens // 3
    moments.add(x[:third], original[:third])
    moments.add(x[third:], original[third:])
    stats, a, b = moments.stats(), x.double().numpy(), original.double().numpy()
    close(stats.second_moment, a.T @ a / num_tokens)
    close(stats.cross_moment, b.T @ a / num_tokens)
    close(stats.mean, a.mean(0))
    close(stats.largest, np.abs(a).max(0))
    assert stats.num_tokens == num_tokens
    assert torch.equal(stats.second_moment, stats.second_moment.t())
    assert {tuple(row) for row in stats.sample.tolist()} <= {tuple(row) for row in x.tolist()}


def test_bfloat16_inputs_are_summed_in_float32():
    x = (random(3000, 8) + 4).bfloat16()
    moments = Moments(8, ALL)
    moments.add(x, x)
    wanted = x.double().numpy()
    close(moments.stats().second_moment, wanted.T @ wanted / 3000)
    assert torch.equal(moments.stats().cross_moment, moments.stats().second_moment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_do_not_overflow_or_round_in_the_sums(dtype):
    """Half a million as a product, where float16 ends at 65,504."""
    x, original = (random(600, 8) + 30).to(dtype), (random(600, 8, seed=1) + 90).to(dtype)
    moments = Moments(8, ALL)
    moments.add(x, original)
    a, b = x.double().numpy(), original.double().numpy()
    close(moments.stats().second_moment, a.T @ a / 600)
    close(moments.stats().cross_moment, b.T @ a / 600)


def test_without_a_token_there_is_nothing():
    assert Moments(6, ALL).stats() == Stats()
    moments = Moments(6, ALL)
    moments.add(torch.zeros(0, 6), torch.zeros(0, 6))
    assert moments.stats() == Stats()


def test_what_is_not_asked_for_is_not_gathered():
    moments = Moments(6, frozenset({"mean"}))
    moments.add(random(20, 6), random(20, 6))
    stats = moments.stats()
    assert stats.second_moment is stats.cross_moment is stats.sample is None


def test_nothing_writes_to_the_inputs():
    x, original = random(50, 6), random(50, 6, seed=1)
    before = x.clone(), original.clone()
    moments = Moments(6, ALL)
    moments.add(x, original)
    moments.stats().sample.fill_(7.0)
    assert torch.equal(x, before[0])
    assert torch.equal(original, before[1])


# The sample.


def sampled(num_tokens, seed=0, step=700):
    moments = Moments(1, frozenset({"sample"}), seed)
    for part in torch.arange(float(num_tokens)).unsqueeze(1).split(step):
        moments.add(part)
    return moments.stats().sample.squeeze(1)


def test_the_sample_is_uniform_and_without_repeats():
    kept = torch.cat([sampled(4 * SAMPLE, seed) for seed in range(40)])
    assert all(len(sampled(4 * SAMPLE, seed).unique()) == SAMPLE for seed in range(3))
    counts = torch.histc(kept, 8, 0, 4 * SAMPLE) / len(kept)
    assert ((counts - 1 / 8).abs() < 0.01).all()


def test_the_sample_is_that_of_its_seed():
    assert torch.equal(sampled(2000, seed=3), sampled(2000, seed=3))
    assert not torch.equal(sampled(2000, seed=3), sampled(2000, seed=4))
    assert torch.equal(sampled(300), torch.arange(300.0))


# What a matrix is multiplied with.


def test_padding_is_left_out():
    x, mask = random(3, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 1, 1, 1, 0]])
    (found,) = inputs_of(nn.Linear(4, 2), x, mask)
    assert torch.equal(found, torch.cat([x[0, :3], x[1], x[2, 1:4]]))
    (found,) = inputs_of(nn.Linear(4, 2), x, mask[:2])
    assert torch.equal(found, x.flatten(0, 1))


def test_a_mask_does_not_cut_features():
    """One vector for each example, and as many features as there are positions."""
    x, mask = random(3, 5), torch.tensor([[1, 1, 1, 0, 0]] * 3)
    (found,) = inputs_of(nn.Linear(5, 2), x, mask)
    assert torch.equal(found, x)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)),
    nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=2),
    nn.Conv2d(4, 8, 3, groups=2, padding=1, bias=False),
    nn.Conv2d(4, 4, 3, groups=4, stride=2),
    nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=2),
    nn.Conv1d(4, 6, 1, groups=2),
    nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1)),
]


def conv_input(conv):
    return random(3, conv.in_channels, *[9, 8, 7][: len(conv.kernel_size)])


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_the_matrix_times_the_inputs_is_the_convolution(conv):
    x, bias = conv_input(conv), conv.bias.detach() if conv.bias is not None else 0
    matrix = conv.weight.detach().flatten(1)
    (patches,) = inputs_of(conv, x)
    by_group = patches.view(len(x), -1, conv.groups, patches.shape[-1])
    with torch.no_grad():
        output = conv(x).flatten(2)
    for g in range(conv.groups):
        rows = slice(g * len(matrix) // conv.groups, (g + 1) * len(matrix) // conv.groups)
        made = (by_group[:, :, g] @ matrix[rows].t()).transpose(1, 2)
        torch.testing.assert_close(made + (bias[rows].unsqueeze(1) if conv.bias is not None else 0), output[:, rows])


@pytest.mark.parametrize("conv", [c for c in CONVOLUTIONS if isinstance(c, nn.Conv2d)], ids=str)
def test_patches_are_unfolds(conv):
    x = conv_input(conv)
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    unfolded = unfolded.unflatten(1, (conv.groups, -1)).movedim(3, 1).reshape(-1, conv.weight[0].numel())
    (patches,) = inputs_of(conv, x)
    assert torch.equal(patches, unfolded)


def test_packed_convolutions_and_single_images():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    weight = conv.weight.detach()
    packed = PackedWeight(FORMATS["bf16"].encode(weight.flatten(1), {}), Fold(tuple(weight.shape)), weight.dtype)
    x = conv_input(conv)
    (wanted,) = inputs_of(conv, x)
    pack_layer(conv, PackedConv, packed, None)
    (found,) = inputs_of(conv, x)
    assert torch.equal(found, wanted)
    (one,) = inputs_of(conv, x[0])
    assert torch.equal(one, wanted[: len(one)])


PADDED = [
    {"padding": padding, "padding_mode": mode, "dilation": dilation, "groups": groups}
    for padding, dilation in (("same", 1), ("same", 2), ("valid", 2), (1, 1), (2, 2))
    for mode in ("zeros", "reflect", "replicate", "circular")
    for groups in (1, 2)
]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", PADDED, ids=str)
def test_the_inputs_of_a_convolution_are_what_its_matrix_is_multiplied_with(axes, options):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    conv, x = kind(4, 6, (4, 3, 2)[-axes:], **options), random(2, 4, *(7, 6, 5)[:axes])
    (rows,) = inputs_of(conv, x)
    matrix = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    rows = rows.unflatten(0, (-1, conv.groups))
    made = torch.einsum("tgi,goi->tgo", rows, matrix).flatten(1) + conv.bias
    torch.testing.assert_close(made, conv(x).movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_inputs_that_are_not_known_are_none_at_all():
    assert list(inputs_of(nn.Linear(4, 2), torch.ones(2, 4, dtype=torch.long))) == []


def test_a_large_convolution_comes_in_pieces(monkeypatch):
    conv, x = nn.Conv2d(4, 6, 3, padding=1), random(5, 4, 8, 8)
    (whole,) = inputs_of(conv, x)
    monkeypatch.setattr("tersor.calibration.moments.PATCHES", 2 * 9 * 4 * 64)
    pieces = list(inputs_of(conv, x))
    assert [len(piece) for piece in pieces] == [128, 128, 64]
    assert torch.equal(torch.cat(pieces), whole)
