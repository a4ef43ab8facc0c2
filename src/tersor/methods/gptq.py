"""GPTQ: second-order rounding (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), with what was learned since.

Columns are rounded one after another in activation order (by falling diagonal of the Hessian), and the columns that
are not rounded yet make up for each error (solver.py).
Scales are searched beforehand (static groups: files stay kernel friendly whatever the order), weighted by the inputs'
energy; `upstream_correction` lets every site also repair the error its inputs already carry (Qronos, Zhang et al. 2025,
https://arxiv.org/abs/2505.11695). Then codes and scales take turns: coordinate descent on the codes, least squares on
the scales, as long as the error falls.
"""

from dataclasses import dataclass

from tersor.core.errors import InputError
from tersor.formats.contract import Encoded, Grid, Params, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.mse import searched
from tersor.methods.solver import Problem, polish, pose, rescaling, sweep
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Gptq(MethodFor[Grid]):
    """Round column by column with error feedback.

    Attributes:
        damping: added to the diagonal of `E[x x']`, as a fraction of its mean.
        upstream_correction: how much of the error made earlier in the model each site repairs, 0 to 1.
        num_rounds: of rescaling and coordinate descent after the sweep, 0 for none; without a number, two on integer
            grids below 3 bits, where they pay.
    """

    damping: float = 0.01
    upstream_correction: float = 1.0
    num_rounds: int | None = None

    name = "gptq"
    fills = Grid
    refusal = "rounds to a grid, and {format} has none; use int4-g64"
    needs = frozenset({"second_moment", "cross_moment"})

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and 0 <= self.upstream_correction <= 1 and (self.num_rounds or 0) >= 0):
            raise InputError(f"{self}: damping and num_rounds must be 0 or more, and upstream_correction lie in [0, 1]")
        if not self.upstream_correction:  # then the original model need not run beside
            object.__setattr__(self, "needs", frozenset({"second_moment"}))

    def fill(self, weight: Weight, format: Grid, stats: Stats) -> Encoded:
        return self.solve(pose(weight, stats, self.damping, self.upstream_correction), format)

    def solve(self, problem: Problem, format: Grid) -> Encoded:
        """The point of `format` for one site's problem."""
        shape = (problem.target.shape[0], problem.target.shape[1])
        params = searched(problem.target, format, problem.moment.diagonal())
        values = sweep(problem, format.projector(params, shape))
        coarse = format.integer_bits is not None and format.integer_bits < 3
        num_rounds = self.num_rounds if self.num_rounds is not None else 2 * coarse
        lowest = problem.loss(values) if num_rounds else 0.0
        for _ in range(num_rounds):
            candidate = rescaled(problem, values, format, params)
            moved = polish(problem, values, format.projector(candidate, shape))
            loss = problem.loss(moved)
            if loss >= lowest:
                break
            values, params, lowest = moved, candidate, loss
        return format.encode(values, params)


def rescaled(problem: Problem, values: Weight, format: Grid, params: Params) -> Params:
    """Integer scales moved to the least-squares fit of the codes they have; other grids stay."""
    if format.integer_bits is None:
        return params
    factor = rescaling(problem, values, format.grouped(values).shape[-1])
    return format.rescaled(params, factor)
