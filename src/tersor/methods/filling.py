"""Rounding to codes of any size, column after column, where a code nearer to zero may take fewer bits than it costs."""

from functools import cache
from math import log

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.formats.coded import LARGEST, scales
from tersor.methods.solver import Problem

HUGE = 1e15  # steps, whose squares would leave float32
BIT = log(2) / 6  # squared error, in steps, that a bit is worth where each weight adds `level^2 / 24` to the loss
PER_OCTAVE = 8  # deviations that are told apart


class ColumnRounder:
    """Rounds column after column, as a solver asks for them; a column's scale follows the codes that it gets.

    Args:
        params: of the format; the exponents of the columns are changed.
        bit: squared error, in steps, that a bit is worth.
        kept: False where the weight stays zero.
    """

    def __init__(self, problem: Problem, params: dict[str, Tensor], bit: float, kept: Bool[Tensor, "out in"]):
        self.params, self.bit = params, bit
        self.kept = None if kept.all() else kept
        scale, row_octave, self.octave = (value.item() for value in params["scale"][0])
        self.rows = torch.exp2(params["row"][:, 0].double() * row_octave).float()
        self.columns = (scale * torch.exp2(params["column"][0].double() * self.octave)).tolist()
        self.row_spread, spread = spreads(problem, self.rows)
        self.column_spread = spread.tolist()

    @classmethod
    def of(
        cls, problem: Problem, rows: Float[Tensor, " out"], level: float, rate: float, kept: Bool[Tensor, "out in"]
    ) -> "ColumnRounder":
        """A rounder with the steps that `level` asks for, larger ones if codes would leave their range."""
        columns = columns_at(problem, level)
        largest = (problem.target.abs() / rows.unsqueeze(1)).amax(0)
        return cls(problem, scales(rows, columns.maximum(2 * largest / LARGEST)), rate * BIT, kept)

    def __call__(self, values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
        exact = values / (self.rows * self.columns[j])
        deviation = self.row_spread * (self.column_spread[j] / self.columns[j])
        codes = self.choose(exact, deviation, None if self.kept is None else self.kept[:, j])
        energy = codes.dot(codes).item()
        gain = exact.dot(codes).item() / energy if energy else 1.0
        shift = round(log(gain, 2) / self.octave) if gain > 0 else 0
        if shift:
            self.params["column"][0, j] += shift
            self.columns[j] *= 2 ** (shift * self.octave)
        return codes * (self.rows * self.columns[j])

    def choose(
        self, exact: Float[Tensor, " out"], deviation: Float[Tensor, " out"], kept: Bool[Tensor, " out"] | None
    ) -> Float[Tensor, " out"]:
        """The codes of a column from its values and their standard deviations, both in steps; 0 where not `kept`."""
        codes = cheapest(exact, deviation, self.bit)
        return codes if kept is None else codes * kept


def columns_at(problem: Problem, level: float) -> Float[Tensor, " in"]:
    """The factor of the step that belongs to each column, `[in]`; rows have a factor of their own."""
    return level / problem.factor.diagonal()[problem.order.argsort()]


def spreads(problem: Problem, rows: Float[Tensor, " out"]) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """The deviation of a weight over its row's step, as a product of its row's and its column's."""
    exact = problem.target / rows.unsqueeze(1)
    huge = exact.numel() > 0 and exact.abs().max().item() > HUGE
    squares = (exact.double() if huge else exact).square()
    column = (squares.mean(0) / squares.mean().clamp_min(1e-30)).sqrt()
    return squares.mean(1).sqrt().float(), column.float()


def code_masses(deviation: Float[Tensor, " n"], num_codes: int = 16) -> Float[Tensor, "n code"]:
    """The probabilities of the codes from 0 on, of rounded normal numbers."""
    edges = (torch.arange(num_codes + 1, dtype=torch.float64) - 0.5) / deviation.double().unsqueeze(1)
    tails = torch.special.erfc(edges / 2**0.5) / 2
    return tails[:, :-1] - tails[:, 1:]


NUM_CODES = 16
MIN_OCTAVE, NUM_SPREADS = -3, 64


@cache
def saved_bits() -> Float[Tensor, " spread_code"]:
    """The bits that a code takes more than the next one towards zero, for the codes 0 to 15 at each of 64 deviations
    from 2^-3 steps on."""
    deviation = torch.exp2(MIN_OCTAVE + torch.arange(NUM_SPREADS, dtype=torch.float64) / PER_OCTAVE)
    bits = -code_masses(deviation).clamp_min(1e-12).log2()
    return bits.diff(dim=1, prepend=bits[:, :1]).float().flatten()


def cheapest(exact: Float[Tensor, " n"], deviation: Float[Tensor, " n"], bit: float) -> Float[Tensor, " n"]:
    """The nearest code or the next one towards zero, whichever has the least `error^2 + bit * bits`."""
    size = exact.abs()
    near = size.round().clamp_(max=LARGEST)
    if bit:
        spread = (deviation.clamp_min(1e-30).log2() - MIN_OCTAVE).mul_(PER_OCTAVE).round_().clamp_(0, NUM_SPREADS - 1)
        saved = saved_bits().to(exact.device)[(spread * NUM_CODES + near.clamp(max=NUM_CODES - 1)).long()]
        # (size - near + 1)^2 - (size - near)^2 = 2 (size - near) + 1
        near -= (2 * (size - near) + 1 < bit * saved).float()
    return near.copysign(exact)
