"""Searched scales: the best of every range that is tried, never worse than nearest."""

import numpy as np
import pytest
import torch

import laws
from laws import odd_weights, random, same_parts, stats_for
from tersor.formats import FORMATS, int_group
from tersor.formats.contract import Grid
from tersor.formats.int_group import IntGroup
from tersor.methods import Mse, Nearest
from tersor.methods.mse import searched
from tersor.methods.stats import Stats

GRIDS = [name for name, format in FORMATS.items() if Mse().accepts(format) is None]
f64 = np.float64


@pytest.mark.parametrize("of", [pytest.param(8, id="an eighth"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GRIDS)
def test_never_worse_than_nearest(name, of):
    """In no group, with statistics and without; a column that never fired counts 1 % of the mean."""
    format = FORMATS[name]
    for weight, stats in laws.share(laws.cases_for(Mse(), format), of, name).values():
        importance = laws.importance(weight, stats)
        laws.no_worse_than(Mse(), Nearest(), format, weight, stats, importance)


def textbook(weights, importance, format, num_steps=20, smallest=0.4):
    """The lowest error of one group `[in]`, in float64: all ranges, below 4 bits also with the longer end of a
    symmetric grid on the other side, then least squares on the best one's codes."""
    levels = 2**format.bits
    lowest_code = 1 if format.bits == 8 and format.symmetric else 0

    def grid(shrink):
        low, high = weights.min(), weights.max()
        if not format.symmetric:
            low, high = min(low * shrink, 0), max(high * shrink, 0)
            scale = f64(np.float16((high - low) / (levels - 1)))
            return scale, np.clip(np.round(-low / scale * 256 / levels), 0, 255) * levels / 256
        if format.bits == 8:
            return f64(np.float16(max(high, -low) * shrink / 127)), 128.0
        return f64(np.float16((high if high > -low else low) * shrink / (-levels / 2))), levels / 2

    def codes(scale, zero_point):
        return np.clip(np.round(weights / scale + zero_point), lowest_code, levels - 1) - zero_point

    def error(scale, zero_point):
        return (importance * (codes(scale, zero_point) * scale - weights) ** 2).sum()

    shrinks = [1 - (1 - smallest) * step / num_steps for step in range(num_steps + 1)]
    if format.symmetric and format.bits < 4:
        shrinks += [-shrink for shrink in shrinks]
    tried = [grid(shrink) for shrink in shrinks]
    scale, zero_point = min(tried, key=lambda params: error(*params))
    q = codes(scale, zero_point)
    refitted = f64(np.float16((importance * q * weights).sum() / (importance * q * q).sum()))
    return min(error(scale, zero_point), error(refitted, zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["no data", "curvature"])
def test_agrees_with_brute_force(bits, symmetric, kind):
    format, weight = IntGroup(bits, 32, symmetric), odd_weights()["heavy tails"]
    stats = stats_for(weight)[kind]
    importance = np.ones(128) if stats.column_weight is None else stats.column_weight.double().numpy() + 0.01
    error = (Mse().compress(weight, format, stats).decode().double() - weight.double()).numpy() ** 2 * importance
    for row in range(weight.shape[0]):
        for start in range(0, 128, 32):
            place = slice(start, start + 32)
            expected = textbook(weight[row, place].double().numpy(), importance[place], format)
            np.testing.assert_allclose(error[row, place].sum(), expected, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_lowers_the_error_of_gaussian_weights(bits, symmetric):
    """The promise: clipping pays, the more so the fewer bits there are."""
    weight, format = random(32, 256), IntGroup(bits, 64, symmetric)
    errors = [
        (method.compress(weight, format, Stats()).decode() - weight).square().mean() for method in (Mse(), Nearest())
    ]
    assert errors[0] < {4: 0.95, 3: 0.9, 2: 0.8}[bits] * errors[1]


def test_curvature_moves_the_error_to_where_it_does_not_matter():
    weight, format = random(16, 128), IntGroup(3, None)
    columns = torch.ones(128)
    columns[:64] = 0.02
    columns /= columns.mean()
    stats = Stats(row_weight=torch.ones(16), column_weight=columns)
    blind, seeing = (Mse().compress(weight, format, s).decode() - weight for s in (Stats(), stats))
    assert stats.loss(seeing) < stats.loss(blind)


def test_rows_at_a_time_or_all_at_once(monkeypatch):
    weight, format = odd_weights()["heavy tails"], IntGroup(4, 32, symmetric=False)
    stats = stats_for(weight)["curvature"]
    whole = Mse().compress(weight, format, stats).parts
    monkeypatch.setattr(int_group, "CHUNK", 300)
    assert same_parts(Mse().compress(weight, format, stats).parts, whole)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("nf4", 0.84), ("nf4-dq", 0.84), ("mxfp4", 0.95), ("nvfp4", 0.75), ("fp8-e4m3", 0.9), ("fp8-e5m2", 0.9)],
)
def test_lowers_the_error_of_small_floats(name, ratio):
    """A quarter of NVFP4's error goes when the largest weight of a block may also land on 4 (four over six)."""
    weight, format = random(64, 576), FORMATS[name]
    errors = [
        (method.compress(weight, format, Stats()).decode() - weight).square().mean() for method in (Mse(), Nearest())
    ]
    assert errors[0] < ratio * errors[1]


@pytest.mark.parametrize("name", ["int4-g128", "int2-g128", "int3-g128-asym", "nf4", "mxfp4", "nvfp4"])
def test_a_shorter_last_group_is_a_group_of_its_own(name):
    """576 = 4.5 x 128: the last 64 columns get what they would get alone."""
    format, size = FORMATS[name], FORMATS[name].group_size
    num_columns = 4 * size + size // 2
    weight = random(8, num_columns)
    weight[0, 0] = 10.0  # what the scale of a tensor follows, in both
    columns = stats_for(weight)["curvature"].column_weight
    whole = searched(weight, format, columns)
    end = torch.cat([weight[:, :size], weight[:, 4 * size :]], dim=1)
    alone = searched(end, format, torch.cat([columns[:size], columns[4 * size :]]))
    quantized = format.fake_quantize(weight, whole)
    assert torch.equal(quantized[:, 4 * size :], format.fake_quantize(end, alone)[:, size:])
    assert torch.equal(format.encode(weight, whole).decode(), quantized)


def test_the_inputs_energy_is_preferred_to_the_curvature():
    weight, format = random(16, 128), FORMATS["nvfp4"]
    energy = stats_for(weight)["curvature"].column_weight
    parts = Mse().compress(weight, format, Stats(column_weight=energy)).parts
    moment = torch.diag(energy) + 0.1 - 0.1 * torch.eye(128)
    stats = Stats(column_weight=torch.ones(128), second_moment=moment)
    assert same_parts(Mse().compress(weight, format, stats).parts, parts)


def test_searched_takes_every_grid():
    for name, format in FORMATS.items():
        if isinstance(format, Grid):
            weight = laws.widened(random(8, 128), format)
            params = searched(weight, format, torch.ones(weight.shape[1]))
            assert torch.equal(format.encode(weight, params).decode(), format.fake_quantize(weight, params)), name
