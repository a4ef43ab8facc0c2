"""One noise level: the loss it promises, the bits it takes, and the slow way to the same codes."""

from dataclasses import replace

import pytest
import torch

from laws import random
from tersor.codecs.integers import estimate_bits
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.formats.coded import Coded, steps
from tersor.methods.filling import cheapest
from tersor.methods.gptq import Gptq
from tersor.methods.stats import Stats
from tersor.methods.waterfill import UNREACHED, Waterfill, unseen


def inputs(num_tokens, num_columns, seed=1):
    """Correlated features, some of much energy and some of next to none."""
    mixing = random(num_columns, num_columns, seed=seed) / num_columns**0.5 + torch.eye(num_columns)
    order = torch.randperm(num_columns, generator=torch.Generator().manual_seed(3))
    return (random(num_tokens, num_columns, seed=seed + 1) @ mixing) * torch.logspace(-1, 1, num_columns)[order]


def stats_of(x, curvature, original=None):
    """Rows that matter as `curvature` says, per token's worth of the second moment."""
    second = x.t() @ x / len(x)
    cross = None if original is None else original.t() @ x / len(x)
    row = curvature * second.diagonal().mean()
    return Stats(row_weight=row, second_moment=second, cross_moment=cross, num_tokens=len(x))


def loss(encoded, weight, stats):
    error, second = encoded.decode() - weight, stats.second_moment
    curvature = stats.row_weight / second.diagonal().mean()
    return 0.5 * (((error @ second) * error).sum(1) @ curvature).item()


def bits(encoded):
    """Of all parts, a weight."""
    return (
        sum(estimate_bits(encoded.parts[name]) for name in ("codes", "row", "column")) / encoded.parts["codes"].numel()
    )


CURVATURE = 1e-4 * random(192, seed=9).exp()


def problem(num_rows=192, num_columns=256):
    x = inputs(2000, num_columns)
    return random(num_rows, num_columns, seed=4), stats_of(x, CURVATURE[:num_rows])


def test_the_level_says_the_loss():
    weight, stats = problem()
    for level in (2e-4, 2e-3):
        encoded = Waterfill(level=level, upstream_correction=0, damping=1e-6).compress(weight, Coded(), stats)
        assert loss(encoded, weight, stats) == pytest.approx(weight.numel() * level**2 / 24, rel=0.15)


def test_half_the_level_is_one_bit():
    weight, stats = problem()
    taken = [
        bits(Waterfill(level=level, upstream_correction=0).compress(weight, Coded(), stats)) for level in (2e-4, 1e-4)
    ]
    assert taken[1] - taken[0] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", ["int4-g64", "int3-g64"])
def test_less_loss_than_gptq_in_fewer_bits(name):
    weight, stats = problem()
    fixed = Gptq(upstream_correction=0).compress(weight, FORMATS[name], stats)
    level = (24 * 0.5 * loss(fixed, weight, stats) / weight.numel()) ** 0.5
    ours = Waterfill(level=level, upstream_correction=0).compress(weight, Coded(), stats)
    assert loss(ours, weight, stats) < 0.6 * loss(fixed, weight, stats)
    assert bits(ours) < fixed.bits_per_weight - 0.5


def test_every_row_and_column_adds_the_same():
    """Steps go with the root of the curvature, and with what the columns that are free leave of each."""
    weight, stats = problem(64, 96)
    encoded = Waterfill(level=3e-5, upstream_correction=0).compress(weight, Coded(), stats)
    error = encoded.decode() - weight
    step = steps(encoded.parts).double()
    off = (step[:, 0] * CURVATURE[:64].double().sqrt()).log2()
    assert off.std() < 0.1
    by_row = ((error @ stats.second_moment) * error).sum(1) * CURVATURE[:64]
    assert by_row.std() < 0.35 * by_row.mean()  # 96 errors each: chance alone gives 0.1 to 0.2


def textbook(weight, stats, level, damping):
    """Round to nearest with error feedback, as GPTQ's paper spreads it: a row of the inverse Hessian's factor at a
    time, float64. Steps from the conditional deviations of the inputs in activation order; a scale for each column."""
    second = stats.second_moment.double()
    h = second + damping * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    order = h.diagonal().argsort(descending=True, stable=True)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    curvature = (stats.row_weight + 0.02 * stats.row_weight.mean()).double() / h.diagonal().mean()
    rows = curvature.rsqrt()
    columns = level * u.diagonal()  # 1 / L_jj
    rows, columns = nearest_power(rows), nearest_power(columns)
    w, codes = weight.double()[:, order], torch.empty(weight.shape, dtype=torch.float64)
    for place in range(len(order)):
        exact = w[:, place] / (rows * columns[place])
        codes[:, place] = exact.round()
        gain = (exact @ codes[:, place]) / codes[:, place].square().sum()
        gain = 2 ** (round(gain.log2().item() * 16) / 16)
        error = (w[:, place] - codes[:, place] * rows * columns[place] * gain) / u[place, place]
        w[:, place + 1 :] -= torch.outer(error, u[place, place + 1 :])
    return codes[:, order.argsort()]


def nearest_power(scale):
    middle = scale.log2().mean()
    return torch.exp2(middle + ((scale.log2() - middle) * 16).round() / 16)


def test_the_sweep_is_the_textbook():
    weight, stats = problem(24, 100)
    method = Waterfill(level=1e-4, damping=0.01, upstream_correction=0)
    codes = method.compress(weight, Coded(), stats).parts["codes"]
    expected = textbook(weight, stats, 1e-4, 0.01)
    # Float32 sums may tip a value that lies halfway, and then what follows in its row.
    assert (codes == expected).all(1).float().mean() >= 0.8


@pytest.mark.parametrize("level", [8e-3, 1.6e-2])
def test_counting_bits_pays_at_low_rates(level):
    """Loss and bits together, in the exchange rate that the level sets."""
    weight, stats = problem()

    def cost(**options):
        encoded = Waterfill(level=level, upstream_correction=0, **options).compress(weight, Coded(), stats)
        price = level**2 / 12 * torch.tensor(2.0).log().item()
        return loss(encoded, weight, stats) + price * bits(encoded) * weight.numel()

    assert cost(rate=1, num_rounds=1) < cost(rate=1) < cost()


def test_the_cheapest_code_by_trying_both():
    exact = torch.tensor([0.4, 0.55, -0.55, 0.7, 1.51, -2.6, 300.2, 0.0])
    for deviation in (0.2, 0.6, 3.0):
        normal = torch.distributions.Normal(0, deviation)

        def cost(value, code, normal=normal):
            mass = normal.cdf(torch.tensor(code + 0.5)) - normal.cdf(torch.tensor(code - 0.5))
            return (value - code) ** 2 - 0.1155 * mass.clamp_min(1e-12).log2().item()

        chosen = cheapest(exact, torch.full_like(exact, deviation), 0.1155)
        for value, code in zip(exact.tolist(), chosen.abs().tolist(), strict=True):
            value = abs(value)
            if 0 < value < 10:
                assert cost(value, code) <= min(cost(value, round(value)), cost(value, max(0, round(value) - 1))) + 0.02


def test_upstream_correction_repairs_what_was_lost_before():
    weight, original = random(16, 96), inputs(1000, 96)
    x = original + 0.3 * original.std(0) * random(1000, 96, seed=8)

    def error(share):
        stats = stats_of(x, CURVATURE[:16], original)
        encoded = Waterfill(level=1e-4, upstream_correction=share).compress(weight, Coded(), stats)
        return (original @ weight.t() - x @ encoded.decode().t()).square().sum().item()

    assert error(1.0) < error(0.5) < error(0.0)


def test_rare_words_keep_a_share():
    """Of a vocabulary with frequencies like a text's, rows that the sample never showed get about the curvature that
    they have on average in a new sample."""
    frequency = 1 / torch.arange(1, 20_001).float()
    frequency /= frequency.sum()
    generator = torch.Generator().manual_seed(5)
    counts = torch.bincount(
        frequency.multinomial(4000, replacement=True, generator=generator), minlength=20_000
    ).float()
    truth = 4000 * frequency[counts == 0].mean().item()
    assert truth / 2 < unseen(counts) < truth * 2
    assert unseen(torch.ones(4)) == 0


def test_a_row_without_effect_costs_the_others_nothing():
    """A dead channel is no rare word: it was seen, and takes fewer bits than it did before."""
    weight, stats = problem()
    row_weight = stats.row_weight.clone()
    row_weight[0] = 0
    method = Waterfill(level=1e-3, upstream_correction=0)
    dead = method.compress(weight, Coded(), replace(stats, row_weight=row_weight))
    assert bits(dead) <= bits(method.compress(weight, Coded(), stats))


def test_without_data_the_loss_is_relative_to_the_output():
    weight = 0.03 * random(64, 128)
    for stats, share in ((Stats(), 1.0), (Stats(row_weight=torch.zeros(64)), UNREACHED)):
        encoded = Waterfill(level=1e-3).compress(weight, Coded(), stats)
        error = (encoded.decode() - weight).square().sum() / weight.square().sum()
        assert 0.5 * share * error.item() == pytest.approx(weight.numel() * 1e-6 / 24, rel=0.15)


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them():
    weight, stats = problem()
    pruned = torch.where(weight.abs() > 1, weight, 0.0)
    encoded = Waterfill(level=1e-3, upstream_correction=0).compress(pruned, Coded(), stats)
    assert ((encoded.decode() == 0) | (pruned != 0)).all()
    assert loss(encoded, pruned, stats) < 3 * weight.numel() * 1e-6 / 24
    assert bits(encoded) < 0.7 * bits(Waterfill(level=1e-3, upstream_correction=0).compress(weight, Coded(), stats))


def test_no_site_becomes_zero():
    weight, stats = problem(8, 16)
    assert Waterfill(level=1e3, upstream_correction=0).compress(weight, Coded(), stats).decode().any()
    assert not Waterfill().compress(torch.zeros(8, 16), Coded(), stats).decode().any()


def test_codes_stay_in_their_range():
    """However fine the level: a column with an outlier gets the step that holds it."""
    weight = random(8, 16)
    weight[2, 3] = 1e4
    encoded = Waterfill(level=1e-12).compress(weight, Coded(), Stats())
    off = (encoded.decode() - weight).abs()
    assert off[:, 3].max() < 1e4 / 2**14
    assert off[:, :3].max() < 1e-3


@pytest.mark.parametrize(
    "options", [{"level": 0}, {"level": -1}, {"damping": -1}, {"upstream_correction": 1.5}, {"rate": -1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match=r"waterfill|Waterfill"):
        Waterfill(**options)
