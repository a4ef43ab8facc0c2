"""Paths through a trellis: the best of all there are, the error that is promised, and fewer bits for the same loss."""

from itertools import product

import numpy as np
import pytest
import torch

from golden.container.write_container import on_paths
from methods.test_waterfill import bits, loss, problem
from tersor.checkpoint.container import Container
from tersor.checkpoint.container_write import write
from tersor.core.errors import InputError
from tersor.formats.coded import Coded
from tersor.formats.trellis import NOISE, PATH, POLYNOMIALS, follows
from tersor.methods.solver import pose
from tersor.methods.viterbi import best_paths, parity_bits, predecessors
from tersor.methods.waterfill import Waterfill, bits_at, deviations, row_curvature

NONE = np.empty(0, np.bool_), np.empty(0, np.int32)


def paths(exact, num_states, bit=0.0, kept=NONE[0], spreads=NONE[1], path_rows=PATH):
    exact = np.asarray(exact, np.float32)
    return best_paths(exact, kept, spreads, parity_bits(), bit, *predecessors(num_states), path_rows)


def all_paths(num_rows, num_states, reach):
    """Every column of small codes that passes the parity checks, as they are written in the golden file's maker."""
    halves = torch.tensor(list(product(range(-reach, reach + 1), repeat=num_rows))).t()
    return on_paths(halves, num_states).t().double().numpy()


@pytest.mark.parametrize("num_states", [4, 8, 32])
@pytest.mark.parametrize(("bit", "gap"), [(0.0, None), (0.3, None), (0.0, 2), (0.3, 0)])
def test_the_best_of_all_paths(num_states, bit, gap):
    """Against every path of five rows, by the sum of squared errors and bits; `gap` is a row whose code must be 0."""
    everything, random = all_paths(5, num_states, 2), np.random.default_rng(1)
    spreads = random.integers(8, 40, 5).astype(np.int32)
    kept = np.arange(5) != gap if gap is not None else NONE[0]
    allowed = everything[everything[:, gap] == 0] if gap is not None else everything
    for _ in range(20):
        exact = random.normal(0, 1.2, 5).astype(np.float32)

        def cost(codes, exact=exact):
            error = np.square(codes - exact)
            taken = parity_bits()[spreads, np.abs(codes).astype(int)]
            return (np.where(kept, error, 0) if gap is not None else error).sum() + bit * (
                np.where(kept, taken, 0) if gap is not None else taken
            ).sum()

        found = paths(exact, num_states, bit, kept, spreads)
        assert cost(found) == pytest.approx(min(map(cost, allowed)), abs=1e-4)
        assert gap is None or found[gap] == 0


def test_bits_add_up():
    """Where it is known whether a code is even, the probabilities of those that it can be add up to one."""
    masses = 2.0 ** -parity_bits()[8:48].astype(np.float64)
    for parity in (0, 1):
        own = masses[:, parity::2]
        assert 2 * own.sum(1) - (own[:, 0] if parity == 0 else 0) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("num_states", list(POLYNOMIALS))
def test_the_error_is_what_the_table_says(num_states):
    """More states, less error, all below the 1/3 of steps of two that take as many bits."""
    exact = 30 * torch.randn(100_000, generator=torch.Generator().manual_seed(2)).numpy()
    codes = paths(exact, num_states, path_rows=100_000)
    assert np.square(codes - exact).mean() == pytest.approx(NOISE[num_states], rel=0.01)
    assert list(NOISE.values()) == sorted(NOISE.values(), reverse=True)


@pytest.mark.parametrize("num_states", [4, 64, 256])
def test_columns_are_paths_that_begin_anew(num_states):
    exact = 3 * torch.randn(1200, generator=torch.Generator().manual_seed(5))
    exact[7], exact[800] = 1e6, -1e6
    codes = paths(exact.numpy(), num_states)
    assert follows(codes.astype(np.int16)[:, None], num_states)
    assert torch.equal(
        on_paths(torch.from_numpy(codes).long()[:, None] // 2, num_states)[:, 0].float(), torch.from_numpy(codes)
    )
    assert np.abs(codes).max() < 2**15


@pytest.mark.parametrize(("num_states", "gain"), [(4, 0.10), (8, 0.11), (64, 0.13)])
@pytest.mark.parametrize("level", [2e-4, 2e-3, 6e-3])
def test_the_same_loss_in_fewer_bits(num_states, gain, level):
    """192 rows are short paths; a column of many more saves up to 0.2 bits."""
    weight, stats = problem()
    plain, ours = (
        Waterfill(level=level, upstream_correction=0, damping=1e-6, num_states=each).compress(weight, Coded(), stats)
        for each in (0, num_states)
    )
    assert loss(ours, weight, stats) == pytest.approx(loss(plain, weight, stats), rel=0.06)
    slope = 0.5 * np.log2(loss(plain, weight, stats) / loss(ours, weight, stats))
    assert bits(plain) - bits(ours) + slope > gain


@pytest.mark.parametrize("num_states", [8, 256])
def test_the_forecast_knows_the_trellis(num_states):
    """As many bits fewer as there are, but for what paths of 192 rows lose at their beginnings."""
    weight, stats = problem()
    posed = pose(weight, stats, 0.01, 0.0)
    counts = deviations(posed, row_curvature(weight, posed, stats).rsqrt())
    for level in (5e-4, 3e-3):
        methods = [
            Waterfill(level=level, upstream_correction=0, damping=0.01, num_states=each) for each in (0, num_states)
        ]
        plain, ours = (bits(method.compress(weight, Coded(), stats)) for method in methods)
        expected = (bits_at(counts, level) - bits_at(counts, level, num_states)) / weight.numel()
        assert plain - ours == pytest.approx(expected, abs=0.03)


def test_the_file_has_the_paths(tmp_path):
    weight, stats = problem()
    encoded = Waterfill(level=2e-3, upstream_correction=0, num_states=16, rate=0.5, num_rounds=1).compress(
        weight, Coded(), stats
    )
    assert follows(encoded.parts["codes"].numpy(), 16)
    write(encoded.parts, tmp_path / "model.tersor")
    container = Container(tmp_path / "model.tersor")
    assert container.entries["codes"].codec == "trellis"
    assert torch.equal(container.tensor("codes"), encoded.parts["codes"])
    assert container.stored_bytes("codes") * 8 == pytest.approx(bits(encoded) * weight.numel(), rel=0.05)


def test_zeros_stay_zero_and_sparse_sites_go_without():
    weight, stats = problem()
    few, many = weight.clone(), weight * (torch.arange(weight.numel()).view_as(weight) % 3 > 0)
    few[5, ::2] = 0
    method = Waterfill(level=2e-4, upstream_correction=0, num_states=8)
    for pruned, on_path in ((few, True), (many, False)):
        codes = method.compress(pruned, Coded(), stats).parts["codes"]
        assert (codes[pruned == 0] == 0).all()
        assert follows(codes.numpy(), 8) == on_path


def test_one_row_goes_without():
    stats = problem(1)[1]
    weight = problem()[0][:1]
    plain, ours = (Waterfill(level=1e-4, num_states=each).compress(weight, Coded(), stats) for each in (0, 64))
    assert torch.equal(plain.parts["codes"], ours.parts["codes"])


@pytest.mark.parametrize("num_states", [-1, 2, 48, 512])
def test_other_numbers_of_states_are_refused(num_states):
    with pytest.raises(InputError, match="num_states must be 0, or one of 4, 8, 16, 32, 64, 128, 256"):
        Waterfill(num_states=num_states)
