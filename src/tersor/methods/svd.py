"""Low rank by the principal components of the output (SVD-LLM, Wang et al. 2024, https://arxiv.org/abs/2403.07378).

The product of rank r that changes the outputs least is the truncated SVD of `D W L`, where `S = E[x x'] = L L'` whitens
the inputs and D scales the rows by what they matter to the loss. Its left vectors U are the eigenvectors of
`D W S W' D`, and `W_r = D^-1 U U' D W` needs no inverse of S, so silent inputs do no harm. Without data this is the
plain SVD.

It saves bytes, and multiplications where the factors run apart, only below a rank of `out * in / (out + in)`. At equal
bytes integers lose far less of a language model's weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.threads import threads
from tersor.formats.contract import Encoded, Weight
from tersor.formats.lowrank import LowRank
from tersor.methods.contract import MethodFor
from tersor.methods.solver import check_finite
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Svd(MethodFor[LowRank]):
    """Keep the components of the output with most energy. Of rank, energy and ratio, the first above zero decides.

    Attributes:
        rank: how many components.
        energy: as few components as hold this fraction of the output's energy, 0 to 1.
        ratio: as many components as fit into this fraction of the fp16 matrix's bytes, at least one.
        damping: added to the diagonal of `E[x x']`, as a fraction of its mean: what the calibration data never shows
            is kept too.
    """

    rank: int = 0
    energy: float = 0.0
    ratio: float = 0.5
    damping: float = 0.01

    name = "svd"
    fills = LowRank
    refusal = "finds two thin factors, and {format} does not hold them; use lowrank"
    needs = frozenset({"second_moment", "row_weight", "column_weight"})

    def __post_init__(self) -> None:
        if not (self.rank >= 0 and 0 <= self.energy <= 1 and self.ratio >= 0 and self.damping >= 0):
            raise InputError(f"{self}: rank, ratio and damping must be 0 or more, and energy lie in [0, 1]")
        if not (self.rank or self.energy or self.ratio):
            raise InputError("svd: give rank, energy or ratio, for example ratio=0.5")

    def fill(self, weight: Weight, format: LowRank, stats: Stats) -> Encoded:
        found = principal_components(weight, stats, self.damping)
        rank = self.choose_rank(found.energy, (weight.shape[0], weight.shape[1]))
        return format.encode(weight, format.factors(found.left[:, :rank], found.right[:rank]))

    def choose_rank(self, energy: Float[Tensor, " k"], shape: tuple[int, int]) -> int:
        """Rank from `rank`, else `energy`, else `ratio` (the first that is above zero); at least 1."""
        if self.rank:
            return self.rank
        if self.energy:
            share = energy.cumsum(0)
            return int((share < self.energy * share[-1] * (1 - 1e-12)).sum()) + 1
        return max(1, int(self.ratio * shape[0] * shape[1] / sum(shape)))


@dataclass(frozen=True)
class Components:
    """A weight as a sum of products, the one that adds most to the outputs first; float64.

    Attributes:
        left, right: `left @ right` is the weight, and its first r columns and rows the nearest product of rank r.
        energy: what each adds to the outputs' weighted mean square.
    """

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]
    energy: Float[Tensor, " k"]


@threads(1)
def principal_components(weight: Weight, stats: Stats, damping: float = 0.01) -> Components:
    """The components that minimize `tr(D (W - W') S (W - W')' D)` at every rank, `D^2` being the row weights.

    Without a second moment, S is the columns' curvature, or the identity. Raises DataError where S is not finite.
    """
    d = row_scale(weight, stats).unsqueeze(1)
    moment = damped_moment(weight, stats, damping)
    scaled = d * weight.double()
    if weight.shape[0] <= weight.shape[1]:
        energy, u = largest_first(times(scaled, moment) @ scaled.t())
        return Components(u / d, u.t() @ scaled, energy)
    # The same from the smaller side: with S = R R, the left vectors are D W R V / sigma.
    whitened = times(scaled, root(moment))
    energy, v = largest_first(whitened.t() @ whitened)
    seen = energy > 1e-14 * energy[0]
    u = whitened @ v[:, seen] / energy[seen].sqrt()
    return Components(u / d, u.t() @ scaled, energy[seen])


def row_scale(weight: Weight, stats: Stats) -> Float[Tensor, " out"]:
    """D: the root of the row weights. Rows the data hardly reaches count as 1 % of the average row, as columns do."""
    rows = torch.ones(len(weight)) if stats.row_weight is None else stats.row_weight
    rows = rows.to(weight.device).double()
    return (rows + 0.01 * rows.mean()).sqrt() if rows.any() else torch.ones_like(rows)


def damped_moment(weight: Weight, stats: Stats, damping: float) -> Tensor:
    """S `[in, in]` with a fraction of its mean added to its diagonal, or `[in]` where S is diagonal; float64."""
    if stats.second_moment is not None:
        moment = stats.second_moment.to(weight.device).double()
    else:
        columns = torch.ones(weight.shape[1]) if stats.column_weight is None else stats.column_weight
        moment = columns.to(weight.device).double()
    check_finite("second moment", moment)
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    if not diagonal.any():  # inputs that were always silent say nothing
        return torch.ones_like(diagonal)
    extra = damping * diagonal.mean()
    return moment + extra if moment.dim() == 1 else moment + extra * torch.eye(len(moment)).to(moment)


def times(matrix: Tensor, square: Tensor) -> Tensor:
    """The matrix product; a diagonal factor is given by its diagonal `[n]`."""
    return matrix * square if square.dim() == 1 else matrix @ square


def root(square: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix; of a diagonal `[n]`, its diagonal."""
    if square.dim() == 1:
        return square.sqrt()
    values, vectors = torch.linalg.eigh(square)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.t()


def largest_first(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and the eigenvectors as columns in that order."""
    values, vectors = torch.linalg.eigh(square)
    return values.flip(0).clamp_min(0), vectors.flip(1)
