"""LQER: repair a quantized weight by a low-rank correction (Zhang et al. 2024, https://arxiv.org/abs/2402.02446).

The error that quantization leaves is itself a matrix; the product of two thin factors that repairs most of it, as the
outputs see it, is kept beside the codes. Rank r takes `16 * r * (out + in)` bits: rank 32 of a square matrix with 1024
columns is one bit per weight.
"""

from dataclasses import dataclass

from tersor.core.errors import InputError
from tersor.formats.contract import Encoded, Weight
from tersor.formats.lowrank import Corrected, LowRank
from tersor.methods.contract import MethodFor
from tersor.methods.gptq import Gptq
from tersor.methods.mse import Mse
from tersor.methods.solver import pose
from tersor.methods.stats import Stats
from tersor.methods.svd import principal_components


@dataclass(frozen=True)
class Lqer(MethodFor[Corrected]):
    """Quantize (`gptq` where the inputs' second moment is known, else `mse`), then correct the error.

    Attributes:
        rank: of the correction; at most the smaller side of the matrix.
        damping: added to the diagonal of `E[x x']`, as a fraction of its mean.
    """

    rank: int = 32
    damping: float = 0.01

    name = "lqer"
    fills = Corrected
    refusal = "adds a low-rank correction, and {format} has no place for it; use int4-g64+lowrank"
    needs = Gptq.needs | Mse.needs | {"row_weight"}

    def __post_init__(self) -> None:
        if not (self.rank >= 0 and self.damping >= 0):
            raise InputError(f"{self}: rank and damping must be 0 or more")

    def fill(self, weight: Weight, format: Corrected, stats: Stats) -> Encoded:
        if stats.second_moment is None:
            target, base = weight, Mse().compress(weight, format.base, stats)
        else:
            gptq = Gptq(damping=self.damping)
            problem = pose(weight, stats, gptq.damping, gptq.upstream_correction)
            target, base = problem.target, gptq.solve(problem, format.base)
        found = principal_components(target - base.decode(), stats, self.damping)
        return format.join(base, LowRank().factors(found.left[:, : self.rank], found.right[: self.rank]))
