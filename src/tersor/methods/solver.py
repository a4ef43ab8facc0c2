"""The one solver behind the second-order methods.

All of them minimize the error of a site's output over the calibration data,

    min over W' in the format   tr( (W' - T) S (W' - T)' ),   S = E[x x'],   T = W E[x_original x'] S^-1

where x is the site's input in the model compressed so far, and T repairs what was lost before the site (Qronos,
Zhang et al. 2025, https://arxiv.org/abs/2505.11695; GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692). With
S = L L' the error is |(W' - T) L|^2, and one column after another is projected on the format while the others are still
free to make up for it: successive projection on the lattice spanned by L, which is GPTQ (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323; the same thing as Babai's nearest plane, Chen et al. 2025,
https://arxiv.org/abs/2507.18553).

The solver runs on one thread, so that its results do not depend on how many there are: next to the passes that
gather the moments it takes little time.

Everything here works on transposed matrices `[in, out]`, so that a column of the weight is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import DataError
from tersor.core.threads import threads
from tersor.formats.contract import Weight
from tersor.methods.stats import Stats

BLOCK = 64  # columns whose mutual updates are done at once, before the rest sees them
Project = Callable[[Float[Tensor, " out"], int], Float[Tensor, " out"]]
Choose = Callable[[Float[Tensor, "out k"], Float[Tensor, " k"], int], None]


@dataclass(frozen=True)
class Problem:
    """One site's least-squares problem, in the order in which columns are solved (last first).

    Attributes:
        order: the column that stands at each place, `[in]`.
        target: T, float32, columns in the site's own order.
        moment: the damped S, float32, in the site's own order.
        factor: L of the damped S in solving order, lower triangular, float32.
    """

    order: Tensor
    target: Weight
    moment: Float[Tensor, "in in"]
    factor: Float[Tensor, "in in"]

    @threads(1)
    def loss(self, weight: Weight) -> float:
        """`tr((W' - T) S (W' - T)')`, the mean squared error of the output per token."""
        error = weight - self.target
        return ((error @ self.moment) * error).sum().item()


@threads(1)
def pose(
    weight: Weight,
    stats: Stats,
    damping: float,
    upstream_correction: float,
    reorder: bool = True,
    ascending: bool = False,
) -> Problem:
    """The problem of one site. Without moments, S is the columns' curvature, or the identity.

    Args:
        reorder: activation order: solve columns by falling energy of their inputs (the diagonal of S), so that the
            errors that weigh most can still be made up for by all others; else the last column comes first.
        ascending: with `reorder`, by rising energy: the others have then made up for most of what is lost in the last.
        damping: what is added to the diagonal of S, as a fraction of its mean; more where that is not enough for S to
            be positive definite.
        upstream_correction: how much of the error made before this site is repaired here, 0 to 1.

    Raises:
        DataError: the statistics hold NaN or infinity.
    """
    num_columns = weight.shape[1]
    moment, cross = second_moment(num_columns, stats), stats.cross_moment
    for name, matrix in (("second moment", moment), ("cross moment", cross)):
        if matrix is not None:
            check_finite(name, matrix)
    diagonal = moment.diagonal().double()
    scale = diagonal.mean().item() or 1.0
    # Columns are solved from the end.
    places = torch.arange(num_columns, device=weight.device)
    order = diagonal.argsort(stable=True, descending=ascending) if reorder else places
    for _ in range(12):
        permuted = moment[order.unsqueeze(1), order].double()
        permuted.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(permuted)
        del permuted  # in the largest sites each copy counts
        if not failed:
            break
        damping = max(10 * damping, 1e-8)
    else:
        raise DataError("the second moment of the inputs has no Cholesky factor; use more calibration data")
    factor, target = factor.float(), weight
    if cross is not None and upstream_correction > 0:
        # T - W = W (E[x_original x'] - S) (S + damping)^-1: the damping pulls T towards W.
        gap = (weight @ (cross.to(weight.device) - moment).float()) * upstream_correction
        repair = torch.cholesky_solve(gap[:, order].t(), factor)
        target = weight + repair.t()[:, order.argsort()]
    damped = moment.to(torch.float32, copy=True)
    damped.diagonal().copy_(diagonal + damping * scale)
    return Problem(order, target, damped, factor)


def check_finite(name: str, moment: Tensor) -> None:
    """Raises DataError if a moment of the inputs holds NaN or infinity."""
    if not torch.isfinite(torch.stack(moment.aminmax())).all():
        raise DataError(
            f"the {name} of the inputs is not finite: the model overflows on the calibration data; use other data, or "
            f"open the model with --dtype float32"
        )


def second_moment(num_columns: int, stats: Stats) -> Float[Tensor, "in in"]:
    """S, or what stands in for it: the diagonal of the columns' curvature, or the identity."""
    if stats.second_moment is not None:
        return stats.second_moment
    if stats.column_weight is not None and stats.column_weight.any():
        return torch.diag(stats.column_weight)
    return torch.eye(num_columns)


@threads(1)
def sweep(problem: Problem, project: Project, choose: Choose | None = None, group_size: int = BLOCK) -> Weight:
    """Fix one column after another, each time letting those still free make up for the error.

    Args:
        project: `project(values [out], j)`: the nearest values that column j may take.
        choose: `choose(values [out, k], pivots [k], start)`: called before the k columns from place `start` on are
            fixed, with the values they would have now if they were free; an error in one costs `(pivot * error)^2`.
        group_size: how many places `choose` sees at a time, a divisor of BLOCK.
    """
    factor, order = problem.factor, problem.order
    columns, pivots = order.tolist(), factor.diagonal().tolist()
    open_error = factor.t() @ problem.target[:, order].t()  # (T L)', less the columns that are fixed
    fixed = torch.empty_like(open_error)
    for start in reversed(range(0, len(order), BLOCK)):
        stop = min(start + BLOCK, len(order))
        within, square = open_error[start:stop], factor[start:stop, start:stop]
        for j in reversed(range(stop - start)):
            if choose and (j == stop - start - 1 or (j + 1) % group_size == 0):
                group = slice(j - j % group_size, j + 1)
                corner = square[group, group]
                free = torch.linalg.solve_triangular(corner.t(), within[group], upper=True)
                choose(free.t(), corner.diagonal(), start + group.start)
            value = project(within[j] / pivots[start + j], columns[start + j])
            fixed[start + j] = value
            within[:j].addr_(square[j, :j], value, alpha=-1)
        open_error[:start].addmm_(factor[start:stop, :start].t(), fixed[start:stop], alpha=-1)
    return fixed[order.argsort()].t().contiguous()


@threads(1)
def polish(problem: Problem, weight: Weight, project: Project, num_rounds: int = 1) -> Weight:
    """Coordinate descent from a point of the format: every column in turn moves to the best values given all others.

    The error never grows (QuantEase, Behdin et al. 2023, https://arxiv.org/abs/2309.01885).
    """
    order = problem.order.flip(0)
    columns = order.tolist()
    moment = problem.moment[order][:, order]
    pivots = moment.diagonal().tolist()
    values = weight[:, order].t().contiguous()
    for value, column in zip(
        values, columns, strict=True
    ):  # where columns bound one another, each is known from now on
        project(value, column)
    for _ in range(num_rounds):
        pull = moment @ (problem.target[:, order].t() - values)  # S (T - W')
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            within, square = pull[start:stop], moment[start:stop, start:stop]
            before = values[start:stop].clone()
            for j in range(stop - start):
                value = project(values[start + j] + within[j] / pivots[start + j], columns[start + j])
                within.addr_(square[j], value - values[start + j], alpha=-1)
                values[start + j] = value
            pull.addmm_(moment[:, start:stop], values[start:stop] - before, alpha=-1)
    return values[order.argsort()].t().contiguous()


@threads(1)
def rescaling(problem: Problem, weight: Weight, group_size: int) -> Float[Tensor, "out groups"]:
    """The factor for each group of columns that, with the codes as they are, makes the error least.

    A small linear system for every row: `sum_h (q_g S_gh q_h) f_h = q_g (S T)_g`.
    """
    num_rows, num_columns = weight.shape
    num_groups = -(-num_columns // group_size)
    padding = num_groups * group_size - num_columns

    def by_group(matrix: Tensor) -> Float[Tensor, "out groups"]:
        return torch.nn.functional.pad(matrix, (0, padding)).unflatten(1, (num_groups, group_size)).sum(-1)

    right = by_group((problem.target @ problem.moment) * weight)
    left = weight.new_empty(num_rows, num_groups, num_groups)
    for g in range(num_groups):
        columns = slice(g * group_size, min((g + 1) * group_size, num_columns))
        left[:, g] = by_group((weight[:, columns] @ problem.moment[columns]) * weight)
    ridge = 1e-4 * left.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30)
    eye = torch.eye(num_groups, device=weight.device)
    left = left + ridge.view(-1, 1, 1) * eye
    return torch.linalg.solve(left.double(), (right + ridge.view(-1, 1)).double()).float()
