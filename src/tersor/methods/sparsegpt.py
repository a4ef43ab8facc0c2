"""SparseGPT: prune column by column and let the rest make up for it (Frantar and Alistarh 2023,
https://arxiv.org/abs/2301.00774), in the same sweep as the rounding where the format also holds integers (as in Optimal
Brain Compression, Frantar et al. 2022, https://arxiv.org/abs/2208.11580).

Which weights go is decided block by block, on the values they have by then. How many go from each block is what one
threshold for all columns gives; the kept weights then settle by coordinate descent.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.threads import mean
from tersor.formats.contract import Encoded, Params, Sparse, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.magnitude import check_sparsity
from tersor.methods.mse import searched
from tersor.methods.solver import BLOCK, Problem, polish, pose, sweep
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class SparseGpt(MethodFor[Sparse]):
    """Prune, or prune and round, with error feedback.

    Attributes:
        sparsity: the fraction of weights set to zero, 0 <= sparsity < 1; a pattern such as 2:4 fixes its own.
        damping: added to the diagonal of `E[x x']`, as a fraction of its mean.
        upstream_correction: how much of the error made earlier in the model each site repairs, 0 to 1.
        num_rounds: of coordinate descent after the sweep.
    """

    sparsity: float = 0.5
    damping: float = 0.01
    upstream_correction: float = 1.0
    num_rounds: int = 2

    name = "sparsegpt"
    fills = Sparse
    refusal = "zeroes weights, and {format} stores zeros like any weight; use bitmask"
    needs = frozenset({"second_moment", "cross_moment"})

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)
        if not (self.damping >= 0 and 0 <= self.upstream_correction <= 1 and self.num_rounds >= 0):
            raise InputError(f"{self}: damping and num_rounds must be 0 or more, and upstream_correction lie in [0, 1]")
        if not self.upstream_correction:  # then the original model need not run beside
            object.__setattr__(self, "needs", frozenset({"second_moment"}))

    def fill(self, weight: Weight, format: Sparse, stats: Stats) -> Encoded:
        shape = (weight.shape[0], weight.shape[1])
        format.fake_quantize(
            weight, format.fit(weight)
        )  # raises where it cannot hold such weights, before the long work
        problem = pose(weight, stats, self.damping, self.upstream_correction, reorder=False)
        params = self.first_guess(problem, format)
        mask, num_zeros = params["mask"], (~params["mask"]).sum(0)

        def choose(values: Float[Tensor, "out k"], pivots: Float[Tensor, " k"], start: int) -> None:
            columns = slice(start, start + values.shape[1])
            fraction = (num_zeros[columns].sum().item() + 0.5) / values.numel()  # the half survives rounding down
            mask[:, columns] = format.choose((values * pivots).abs(), fraction)

        values = sweep(problem, format.projector(params, shape), choose, format.pattern_width or BLOCK)
        values = polish(problem, values, format.projector(params, shape), self.num_rounds)
        return format.encode(values, params)

    def first_guess(self, problem: Problem, format: Sparse) -> Params:
        """The mask that Wanda would choose, and scales for what it keeps."""
        energy = problem.moment.diagonal()
        mask = format.choose(problem.target.square() * energy, self.sparsity)
        if format.kept_grid is None:
            return {"mask": mask}
        kept = torch.where(mask, problem.target, 0.0)
        return {"mask": mask, **searched(kept, format.kept_grid, energy / mean(energy).clamp_min(1e-30))}
