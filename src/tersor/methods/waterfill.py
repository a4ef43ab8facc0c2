"""Reverse water-filling: one noise level for every weight of the model, to be entropy-coded.

A weight `ij` rounded with step s costs about `-log2 s` bits and adds `g_i L_jj^2 s^2 / 24` to the loss, where `g_i` is
the curvature of the loss in the site's output i and L the Cholesky factor of its inputs' second moment: what is left of
input j when the columns still free have made up for all they can (solver.py). At a given size of the file the sum is
least where every weight adds the same:

    step_ij = level / (sqrt(g_i) L_jj)

One number for the whole model then decides what every site, row and column gets (Shannon 1959; over the columns of a
layer: WaterSIC, Lifar et al. 2026, https://arxiv.org/abs/2603.04956). Half the level is about one bit more per weight,
and the predicted loss is `level^2 / 24` for every weight.

Where few bits are left, rounding to nearest is no longer best: a code nearer to zero takes fewer bits, and is chosen
where these are worth more than the error (in a codec for weights: DeepCABAC, Wiedemann et al. 2019,
https://arxiv.org/abs/1907.11900). A column's scale then becomes what its codes stand for on average.

Weights that are exactly zero, such as pruned ones, stay zero, and the others make up for them.

With `num_states`, the codes of a column are chosen together, as a path through a trellis (formats/trellis.py,
viterbi.py): less error at the same bits. The level, and the loss it promises, are the same; the file is smaller.
"""

from dataclasses import dataclass, replace
from math import e, log, pi

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.threads import threads
from tersor.formats.coded import Coded
from tersor.formats.contract import Encoded, Weight
from tersor.formats.trellis import NOISE, POLYNOMIALS
from tersor.methods.contract import MethodFor
from tersor.methods.filling import PER_OCTAVE, ColumnRounder, code_masses, columns_at, spreads
from tersor.methods.solver import Problem, polish, pose, sweep
from tersor.methods.stats import Stats

ROW_DAMPING = 0.02  # of the rows' mean curvature, added to each: calibration shows it with much noise
RARE = 8  # what a rare word counts: it says more than a common one, and a row of zeros costs more than it bends
LEAST_DAMPING, STEPS_DAMPING, UPSTREAM_DAMPING = 0.01, 0.25, 1.0  # of the inputs' mean energy (see `damping_of`)
SPARSE = 0.01  # of the weights being zero, a site has no trellis, which takes odd codes as readily as even ones
UNREACHED = 0.01  # a site that the data never reaches counts as if its output were this share of the loss
FEW_BITS = 2.2  # a weight; below it the columns of most input energy are solved last
GAP = log(pi * e / 6, 2) / 2  # bits a weight that steps alone take above the bound where many are spent
MOST_LOST = 0.9  # of the energy of a site's output
NUM_OCTAVES = 60  # octaves around 1 in which rows and columns deviate


@dataclass(frozen=True)
class Waterfill(MethodFor[Coded]):
    """Round with steps that make every weight's share of the loss the same.

    Attributes:
        level: of the noise. Every weight may add `level^2 / 24` to the loss, in the unit of the task's output (nats of
            divergence, 1 - cosine of embeddings). Without data the loss is half a site's squared error relative to its
            output.
        damping: added to the diagonal of `E[x x']`, as a fraction of its mean; without a number, 0.01 and more where
            there are few tokens for a column (see `damping_of`).
        upstream_correction: how much of the error made earlier in the model each site repairs, 0 to 1.
        rate: how much bits count when a weight is rounded: 0 rounds to nearest, 1 is what the level says.
        num_rounds: of coordinate descent after the sweep.
        num_states: of the trellis, 4 to 256 and a power of two, or 0 for none. Sites of which more than a hundredth of
            the weights are zero, and those of a single row, go without.
    """

    level: float = 2e-4
    damping: float | None = None
    upstream_correction: float = 0.6
    rate: float = 0.0
    num_rounds: int = 0
    num_states: int = 0

    name = "waterfill"
    fills = Coded
    refusal = "chooses the steps of codes without bounds, and {format} has none; use coded"
    needs = frozenset({"second_moment", "cross_moment", "row_weight", "column_weight"})

    def __post_init__(self) -> None:
        if not (0 < self.level < float("inf") and self.rate >= 0 and self.num_rounds >= 0):
            raise InputError(f"{self}: level must be above 0, and rate and num_rounds 0 or more")
        if not ((self.damping or 0) >= 0 and 0 <= self.upstream_correction <= 1):
            raise InputError(f"{self}: damping must be 0 or more, and upstream_correction lie in [0, 1]")
        if self.num_states not in (0, *POLYNOMIALS):
            raise InputError(f"{self}: num_states must be 0, or one of {', '.join(map(str, POLYNOMIALS))}")
        if not self.upstream_correction:  # then the original model need not run beside
            object.__setattr__(self, "needs", self.needs - {"cross_moment"})

    @threads(1)
    def fill(self, weight: Weight, format: Coded, stats: Stats) -> Encoded:
        damping = damping_of(weight, stats, STEPS_DAMPING) if self.damping is None else self.damping
        target, alone = weight, replace(stats, cross_moment=None)
        if self.upstream_correction and stats.cross_moment is not None:
            repair = damping_of(weight, stats, UPSTREAM_DAMPING) if self.damping is None else self.damping
            target = pose(weight, stats, repair, self.upstream_correction).target
        problem = pose(target, alone, damping, upstream_correction=0.0)
        rows = row_curvature(weight, problem, stats).rsqrt()
        level, kept = self.level, weight != 0
        num_states = self.num_states if len(weight) > 1 and kept.double().mean() >= 1 - SPARSE else 0
        if bits_at(deviations(problem, rows), level) < FEW_BITS * weight.numel():
            problem = pose(target, alone, damping, upstream_correction=0.0, ascending=True)
        energy, before = problem.loss(torch.zeros_like(target)), float("nan")
        while True:
            filling = filling_of(problem, rows, level, self.rate, kept, num_states)
            values = sweep(problem, filling)
            loss = problem.loss(values)
            if not weight.any() or (values.any() and not (loss > MOST_LOST * energy and loss != before)):
                break
            before, level = loss, level / 2  # whatever it is worth, no site is lost as a whole
        values = polish(problem, values, filling, self.num_rounds)
        return format.encode(values, filling.params)


def filling_of(
    problem: Problem,
    rows: Float[Tensor, " out"],
    level: float,
    rate: float,
    kept: Bool[Tensor, "out in"],
    num_states: int,
) -> ColumnRounder:
    """The rounding rule: plain, or trellis-coded if `num_states` is above 0."""
    if not num_states:
        return ColumnRounder.of(problem, rows, level, rate, kept)
    from tersor.methods.viterbi import TrellisRounder  # its loops are compiled when it is imported

    return TrellisRounder.through(problem, rows, level, rate, kept, num_states)


def damping_of(weight: Weight, stats: Stats, each: float) -> float:
    """More where the moments are those of few tokens, and say little about others: `each` for every column a token."""
    return LEAST_DAMPING + each * weight.shape[1] / max(1, stats.num_tokens) if stats.num_tokens else LEAST_DAMPING


def deviations(problem: Problem, rows: Float[Tensor, " out"]) -> Float[Tensor, " bin"]:
    """Counts of codes by their standard deviation at level 1, in eighths of an octave; half the level doubles it."""
    row, column = spreads(problem, rows)
    products = np.convolve(histogram(row), histogram(column / columns_at(problem, 1.0)))
    return torch.from_numpy(products)


def histogram(values: Float[Tensor, " n"]) -> np.ndarray:
    """Counts of values by the eighth of an octave they lie in, from `2^-NUM_OCTAVES` to `2^NUM_OCTAVES`."""
    octaves = values.clamp_min(1e-30).log2().clamp(-NUM_OCTAVES, NUM_OCTAVES) + NUM_OCTAVES
    bins = (octaves * PER_OCTAVE).round().long().cpu()
    return np.bincount(bins.numpy(), minlength=2 * NUM_OCTAVES * PER_OCTAVE + 1).astype(np.float64)


def bits_at(counts: Float[Tensor, " bin"], level: float, num_states: int = 0) -> float:
    """About how many bits codes of these deviations (at level 1) take, as if they were normal numbers. A trellis goes a
    part of the way to the bound, where that is not further than at many bits."""
    bits, bounds = entropy(deviations_at(counts, level).exp2()), bounds_at(counts, level)
    if num_states:
        bits = bits - log(1 / (3 * NOISE[num_states]), 2) / 2 * ((bits - bounds) / GAP).clamp_max(1)
    return counts.dot(bits).item()


def bounds_at(counts: Float[Tensor, " bin"], level: float) -> Float[Tensor, " bin"]:
    """The rate-distortion bound in bits for a weight of each standard deviation."""
    return (deviations_at(counts, level) + log(12, 2) / 2).clamp_min(0)


def deviations_at(counts: Float[Tensor, " bin"], level: float) -> Float[Tensor, " bin"]:
    """Standard deviations of the bins in units of the step at this level, as log2."""
    return torch.arange(len(counts), dtype=torch.float64) / PER_OCTAVE - 2 * NUM_OCTAVES - log(level, 2)


def entropy(deviation: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The entropy in bits of normal numbers rounded to whole steps, by their standard deviation in steps."""
    mass = code_masses(deviation.clamp(1e-3, 2.0))
    sides = mass[:, 1:]
    low = -(mass[:, 0] * mass[:, 0].log2()) - 2 * (sides * sides.clamp_min(1e-300).log2()).sum(1)
    return torch.where(deviation > 2, deviation.log2() + log(2 * pi * e, 2) / 2, low)


def row_curvature(weight: Weight, problem: Problem, stats: Stats) -> Float[Tensor, " out"]:
    """The curvature of the loss in every output of the site, above zero."""
    if stats.row_weight is not None and stats.row_weight.any():
        damping = ROW_DAMPING * stats.row_weight.mean().item()
        if stats.second_moment is None:  # an embedding; a row of any other site was seen, even if nothing came of it
            damping = max(damping, RARE * unseen(stats.row_weight))
        return (stats.row_weight.to(weight.device) + damping) / problem.moment.diagonal().mean()
    energy = max(((weight @ problem.moment) * weight).sum().item(), 1e-30)
    share = 1.0 if stats.row_weight is None else UNREACHED
    return torch.full_like(weight[:, 0], share / energy)


def unseen(row_weight: Float[Tensor, " out"]) -> float:
    """The curvature to assume for a row that the data never used, such as the embedding of a rare word.

    All such rows together are used about as often as those that were seen once (Good 1953,
    https://doi.org/10.1093/biomet/40.3-4.237); of the words of a text, half are seen once.
    """
    seen = row_weight[row_weight > 0]
    num_unseen = len(row_weight) - len(seen)
    return seen.quantile(0.25).item() * len(seen) / 2 / num_unseen if num_unseen else 0.0
