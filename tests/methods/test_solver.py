"""The one solver, against the textbook: the inverse Hessian, one column at a time, no blocks, float64."""

import itertools

import pytest
import torch

from laws import random
from tersor.core.errors import DataError
from tersor.formats import FORMATS
from tersor.methods import solver
from tersor.methods.solver import Problem, polish, pose, rescaling, sweep
from tersor.methods.stats import Stats

GRIDS = ["int4-g64", "int3-g32-asym", "int2", "nf4", "nvfp4", "mxfp4", "fp8-e4m3", "codebook16"]


def inputs(num_tokens, num_columns, seed=1):
    """Correlated features, some of much energy and some of next to none, with a mean."""
    mixing = random(num_columns, num_columns, seed=seed) / num_columns**0.5 + torch.eye(num_columns)
    energy = torch.logspace(-1.5, 1, num_columns)[torch.randperm(num_columns, generator=generator(seed))]
    return (random(num_tokens, num_columns, seed=seed + 1) @ mixing + 0.3) * energy


def generator(seed):
    return torch.Generator().manual_seed(seed)


def stats_of(x, original=None):
    cross = None if original is None else original.t() @ x / len(x)
    return Stats(second_moment=x.t() @ x / len(x), cross_moment=cross, num_tokens=len(x))


def textbook(weight, second_moment, damping, format, params, order):
    """GPTQ as in the paper (algorithm 1, block size 1): the columns in `order`, and after each the error is spread over
    those still free along its row of the inverse Hessian's Cholesky factor."""
    h = second_moment.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w = weight.double()[:, order]
    project = format.projector(params, tuple(weight.shape))
    q = torch.empty_like(w)
    for place, column in enumerate(order.tolist()):
        q[:, place] = project(w[:, place].float(), column).double()
        error = (w[:, place] - q[:, place]) / u[place, place]
        w[:, place + 1 :] -= torch.outer(error, u[place, place + 1 :])
    return q[:, order.argsort()].float()


def output_error(weight, other, x):
    return ((weight - other).double() @ x.t().double()).square().sum().item()


@pytest.mark.parametrize("num_columns", [1, 40, 64, 100, 192])
@pytest.mark.parametrize("name", GRIDS)
def test_the_sweep_is_textbook_gptq(name, num_columns):
    format, weight, x = FORMATS[name], random(6, num_columns), inputs(300, num_columns)
    stats, params = stats_of(x), FORMATS[name].fit(random(6, num_columns))
    problem = pose(weight, stats, damping=0.01, upstream_correction=0)
    ours = sweep(problem, format.projector(params, (6, num_columns)))
    theirs = textbook(weight, stats.second_moment, 0.01, format, params, problem.order.flip(0))
    # Float32 sums may tip a value that lies halfway, and then what follows in its row.
    same_rows = (ours == theirs).all(1).float().mean()
    assert same_rows >= 0.8
    assert output_error(weight, ours, x) == pytest.approx(output_error(weight, theirs, x), rel=0.05)


def test_activation_order_and_without_reordering_the_last_column():
    x = inputs(300, 40)
    problem = pose(random(4, 40), stats_of(x), 0.01, 0)
    energy = x.square().mean(0)[problem.order.flip(0)]
    assert (energy[1:] <= energy[:-1] * 1.0001).all()
    assert pose(random(4, 40), stats_of(x), 0.01, 0, reorder=False).order.tolist() == list(range(40))


@pytest.mark.parametrize("num_columns", [7, 64, 130, 200])
def test_blocks_only_save_time(num_columns, monkeypatch):
    """One block for all columns, or one for each, gives what blocks of 64 give."""
    format, weight = FORMATS["int3-g64"], random(5, num_columns)
    problem, project = pose(weight, stats_of(inputs(400, num_columns)), 0.01, 0), None
    project = format.projector(format.fit(weight), (5, num_columns))
    made = []
    for block in (solver.BLOCK, 1, 1000):
        monkeypatch.setattr(solver, "BLOCK", block)
        swept = sweep(problem, project)
        made.append((swept, polish(problem, swept, project)))
    for swept, polished in made[1:]:
        assert (swept == made[0][0]).all(1).float().mean() >= 0.8
        assert problem.loss(polished) == pytest.approx(problem.loss(made[0][1]), rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_polishing_never_costs_anything(name):
    format, weight = FORMATS[name], random(8, 130)
    problem = pose(weight, stats_of(inputs(500, 130)), 0.01, 0)
    project = format.projector(format.fit(weight), (8, 130))
    values = format.fake_quantize(weight, format.fit(weight))
    losses = [problem.loss(values)]
    for _ in range(4):
        values = polish(problem, values, project)
        losses.append(problem.loss(values))
        assert torch.equal(format.fake_quantize(values, format.fit(weight)), values)
    assert losses[1] < 0.9 * losses[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    swept = sweep(problem, project)
    assert problem.loss(polish(problem, swept, project)) <= problem.loss(swept) * (1 + 1e-5)


def test_a_column_alone_is_moved_to_its_optimum():
    """Coordinate descent with free values, run long enough, is the solution: the target."""
    weight = random(4, 20)
    problem = pose(weight, stats_of(inputs(400, 20)), 0.1, 0)
    polished = polish(problem, torch.zeros_like(weight), lambda values, j: values, num_rounds=2000)
    torch.testing.assert_close(polished, problem.target, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("num_columns", "group_size"), [(128, 32), (100, 32), (30, 64), (40, 8)])
def test_rescaling_is_least_squares(num_columns, group_size):
    """The factors of a row's groups are those that lstsq finds for the outputs of its target."""
    weight, x = random(5, num_columns), inputs(600, num_columns)
    problem = pose(weight, stats_of(x), 0.0, 0)
    format = FORMATS["int3-g32"]
    rounded = format.fake_quantize(1.3 * weight, format.fit(weight))
    factors = rescaling(problem, rounded, group_size)
    num_groups = -(-num_columns // group_size)
    assert factors.shape == (5, num_groups)
    for row in range(5):
        parts = torch.zeros(len(x), num_groups, dtype=torch.float64)
        for column in range(num_columns):
            parts[:, column // group_size] += x[:, column].double() * rounded[row, column].double()
        wanted = x.double() @ problem.target[row].double()
        best = torch.linalg.lstsq(parts, wanted.unsqueeze(1), driver="gelsd").solution.squeeze(1)

        def error(f, parts=parts, wanted=wanted):
            return (parts @ f.double() - wanted).square().sum().item()

        # A ridge of 1e-4 keeps groups apart that the data hardly tells apart.
        assert error(best) <= error(factors[row]) <= 1.02 * error(best)
        assert error(factors[row]) < error(torch.ones(num_groups))


def test_groups_of_zeros_keep_their_scale():
    weight = torch.cat([torch.zeros(3, 32), random(3, 32)], dim=1)
    problem = pose(weight, stats_of(inputs(200, 64)), 0.01, 0)
    factors = rescaling(problem, weight, 32)
    assert torch.isfinite(factors).all()
    torch.testing.assert_close(factors[:, 1], torch.ones(3), rtol=1e-3, atol=1e-3)


# The target repairs what was lost before.


def drifted(num_tokens, num_columns):
    x = inputs(num_tokens, num_columns)
    return x, x + 0.3 * x.std(0) * random(num_tokens, num_columns, seed=9) + 0.2 * x.roll(1, dims=1)


def test_the_drift_target_is_the_least_squares_answer():
    """`argmin |W X - T X^|^2` over all of T, by brute force."""
    original, x = drifted(800, 48)
    weight = random(6, 48)
    best = torch.linalg.lstsq(x.double(), original.double() @ weight.t().double()).solution.t()
    target = pose(weight, stats_of(x, original), 1e-7, 1.0).target
    torch.testing.assert_close(target.double(), best, rtol=1e-2, atol=1e-2)
    assert output_error_of_drift(target, weight, original, x) < 0.9 * output_error_of_drift(weight, weight, original, x)


def output_error_of_drift(target, weight, original, x):
    return (original @ weight.t() - x @ target.t()).square().sum().item()


def test_upstream_correction_is_a_share_of_the_way():
    original, x = drifted(800, 48)
    weight = random(6, 48)
    none, half, whole = (pose(weight, stats_of(x, original), 0.01, share).target for share in (0.0, 0.5, 1.0))
    assert torch.equal(none, weight)
    torch.testing.assert_close(half, (weight + whole) / 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(pose(weight, stats_of(x), 0.01, 1.0).target, weight)


def test_the_loss_is_the_output_error_per_token():
    """Up to a constant that no weight changes, also where the inputs drifted."""
    original, x = drifted(500, 30)
    weight = random(4, 30)
    problem = pose(weight, stats_of(x, original), 1e-7, 1.0)
    one, other = weight + 0.1 * random(4, 30, seed=3), weight + 0.2 * random(4, 30, seed=4)
    really = output_error_of_drift(one, weight, original, x) - output_error_of_drift(other, weight, original, x)
    assert (problem.loss(one) - problem.loss(other)) * len(x) == pytest.approx(really, rel=1e-2)


# Poor statistics.


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["few tokens", "dead features", "all dead", "twins"])
def test_singular_moments_work(kind, damping):
    x = inputs(5 if kind == "few tokens" else 300, 70)
    if kind == "dead features":
        x[:, ::3] = 0
    elif kind == "all dead":
        x[:] = 0
    elif kind == "twins":
        x[:, 1::2] = x[:, ::2]
    format, weight = FORMATS["int4-g32"], random(4, 70)
    problem = pose(weight, stats_of(x, x), damping, 1.0)
    project = format.projector(format.fit(weight), (4, 70))
    values = polish(problem, sweep(problem, project), project)
    assert torch.isfinite(values).all()
    assert torch.equal(format.fake_quantize(values, format.fit(weight)), values)
    assert (
        output_error(weight, values, x)
        <= output_error(weight, format.fake_quantize(weight, format.fit(weight)), x) * 1.05
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["second", "cross"])
def test_moments_that_are_not_finite_are_refused(which, bad):
    second, cross = torch.eye(8), torch.eye(8)
    (second if which == "second" else cross)[2, 3] = bad
    with pytest.raises(DataError, match=f"the {which} moment of the inputs is not finite: the model overflows"):
        pose(random(3, 8), Stats(second_moment=second, cross_moment=cross), 0.01, 1.0)


def test_without_moments_the_curvature_stands_in():
    curvature = torch.linspace(0.1, 2, 8)
    problem = pose(random(3, 8), Stats(column_weight=curvature), 0.0, 1.0)
    torch.testing.assert_close(problem.moment, torch.diag(curvature))
    assert torch.equal(pose(random(3, 8), Stats(), 0.0, 1.0).moment, torch.eye(8))
    assert isinstance(problem, Problem)
