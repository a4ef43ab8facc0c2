"""SparseGPT: the mask and the weights of the textbook, exact sparsity, and a better output than Wanda's."""

import pytest
import torch

from laws import params_of, random, same_parts
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.formats.sparse_int import SparseInt
from tersor.methods.magnitude import Magnitude
from tersor.methods.solver import BLOCK
from tersor.methods.sparsegpt import SparseGpt
from tersor.methods.stats import Stats
from tersor.methods.wanda import Wanda


def inputs(num_tokens=500, num_columns=128):
    mixing = random(num_columns, num_columns, seed=1) / num_columns**0.5 + 0.5 * torch.eye(num_columns)
    energy = torch.logspace(-1, 0.5, num_columns)[
        torch.randperm(num_columns, generator=torch.Generator().manual_seed(3))
    ]
    return (random(num_tokens, num_columns, seed=2) @ mixing) * energy


def stats_of(x):
    return Stats(second_moment=x.t() @ x / len(x), num_tokens=len(x))


def textbook(weight, second_moment, damping, group_size, num_zeros_of):
    """Optimal Brain Surgeon, one column at a time from the last to the first, with the inverse of what is left written
    out each time. Before a group of columns, the least `w^2 / [H^-1]_jj` of it go, H being that of the columns up to j.

    Args:
        num_zeros_of: columns -> how many weights of every row go, or of all rows together as a list of one.
    """
    h = second_moment.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    w, kept = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for j in reversed(range(weight.shape[1])):
        if j == weight.shape[1] - 1 or (j + 1) % group_size == 0:
            columns = list(range(j - j % group_size, j + 1))
            salience = torch.stack([w[:, c].square() / torch.linalg.inv(h[: c + 1, : c + 1])[c, c] for c in columns], 1)
            by_row, number = num_zeros_of(columns)
            for row in salience if by_row else [salience.flatten()]:
                row[row.argsort()[:number]] = -1
            kept[:, columns] = salience >= 0
        inverse = torch.linalg.inv(h[: j + 1, : j + 1])
        value = torch.where(kept[:, j], w[:, j].half().double(), 0.0)
        w[:, :j] -= torch.outer((w[:, j] - value) / inverse[j, j], inverse[j, :j])
        w[:, j] = value
    return kept, w.float()


@pytest.mark.parametrize("name", ["2:4", "4:8"])
@pytest.mark.parametrize("num_columns", [40, 64, 104])
def test_patterns_are_those_of_the_textbook(name, num_columns):
    weight, stats = random(6, num_columns), stats_of(inputs(500, num_columns))
    pattern = FORMATS[name]
    encoded = SparseGpt(num_rounds=0).compress(weight, pattern, stats)
    kept, values = textbook(weight, stats.second_moment, 0.01, pattern.m, lambda c: (True, pattern.m - pattern.n))
    agree = ((encoded.decode() != 0) == kept).all(1)
    assert agree.float().mean() >= 0.8  # two weights may all but tie
    torch.testing.assert_close(encoded.decode()[agree], values[agree], rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_masks_without_a_pattern_are_those_of_the_textbook(sparsity):
    weight, x = random(6, 100), inputs(500, 100)
    stats = stats_of(x)
    energy = x.square().mean(0) + 0.01 * x.square().mean()
    threshold = (weight.square() * energy).flatten().sort().values[round(sparsity * 600)]
    goes = weight.square() * energy < threshold
    encoded = SparseGpt(sparsity, num_rounds=0).compress(weight, FORMATS["bitmask"], stats)
    kept, values = textbook(weight, stats.second_moment, 0.01, BLOCK, lambda c: (False, int(goes[:, c].sum())))
    agree = (encoded.decode() != 0) == kept
    assert agree.float().mean() > 0.98
    torch.testing.assert_close(encoded.decode()[agree], values[agree], rtol=0.1, atol=0.03)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77])
@pytest.mark.parametrize("name", ["bitmask", "bitmask+int4-g64"])
def test_sparsity_is_exact(name, sparsity):
    weight = random(8, 100).abs() + 0.5
    encoded = SparseGpt(sparsity).compress(weight, FORMATS[name], stats_of(inputs(500, 100)))
    format = FORMATS[name]
    mask = (format.pattern if isinstance(format, SparseInt) else format).unpack_mask(encoded)
    num_zeros = int((~mask).sum())
    assert abs(num_zeros - sparsity * weight.numel()) <= 1


@pytest.mark.parametrize("name", ["2:4", "2:4+int4-g64"])
def test_every_group_keeps_two_of_four(name):
    encoded = SparseGpt().compress(random(8, 128), FORMATS[name], stats_of(inputs()))
    assert ((encoded.decode() != 0).view(8, 32, 4).sum(-1) <= 2).all()


@pytest.mark.parametrize("name", ["bitmask", "2:4", "4:8", "bitmask+int4-g64", "2:4+int4-g64", "2:4+int8"])
def test_sparsegpt_beats_wanda_beats_magnitude(name):
    weight, format = random(24, 128), FORMATS[name]
    x, unseen = inputs(1200).split(600)

    def error(method):
        return ((method.compress(weight, format, stats_of(x)).decode() - weight) @ unseen.t()).square().sum().item()

    assert error(SparseGpt()) < 0.7 * error(Wanda())
    assert error(Wanda()) < 0.9 * error(Magnitude())


def test_pruning_and_rounding_in_one_sweep_beat_one_after_the_other():
    weight, x, format = random(24, 128), inputs(), FORMATS["2:4+int4-g64"]
    joint = SparseGpt().compress(weight, format, stats_of(x))
    assert torch.equal(format.fake_quantize(joint.decode(), params_of(joint)), joint.decode())
    pruned = SparseGpt().compress(weight, FORMATS["2:4"], stats_of(x)).decode()
    after = format.encode(pruned, {**format.fit(pruned), "mask": pruned != 0})

    def error(encoded):
        return ((encoded.decode() - weight) @ x.t()).square().sum().item()

    assert error(joint) < 0.9 * error(after)


def test_coordinate_descent_settles_what_is_kept():
    weight, x = random(12, 128), inputs()

    def error(num_rounds):
        encoded = SparseGpt(num_rounds=num_rounds).compress(weight, FORMATS["2:4"], stats_of(x))
        return ((encoded.decode() - weight) @ x.t()).square().sum().item()

    assert error(8) < error(2) < error(0)


def test_the_same_bytes_every_time():
    weight, stats = random(8, 128), stats_of(inputs())
    for name in ("bitmask", "2:4+int4-g64"):
        made = [SparseGpt().compress(weight, FORMATS[name], stats).parts for _ in range(2)]
        assert same_parts(*made)


def test_without_statistics_it_keeps_the_largest():
    weight = random(8, 128)
    ours = SparseGpt().compress(weight, FORMATS["2:4"], Stats()).decode()
    torch.testing.assert_close(ours, Magnitude().compress(weight, FORMATS["2:4"], Stats()).decode())


@pytest.mark.parametrize(
    "options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"damping": -1.0}, {"upstream_correction": 2.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match="sparsity"):
        SparseGpt(**options)
