"""Whole columns at a time: the path through a trellis (formats/trellis.py) that costs least.

The Viterbi algorithm (Viterbi 1967, https://doi.org/10.1109/TIT.1967.1054010) as trellis-coded quantization uses it
(Marcellin and Fischer 1990, https://doi.org/10.1109/26.46532): a state of the trellis allows even codes or odd ones,
and code mod 4 says which state comes next; of all paths that lead into a state only the best so far need be kept. A
column is chosen inside the solver's feedback, so that the columns still free make up for its error as for any other.
"""
# mypy: disable-error-code="no-untyped-def"

from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from numpy import ndarray
from torch import Tensor

from tersor.core.compiled import compiled
from tersor.formats.coded import LARGEST, scales
from tersor.formats.trellis import NOISE, PATH, taps
from tersor.methods.filling import BIT, MIN_OCTAVE, NUM_SPREADS, PER_OCTAVE, ColumnRounder, code_masses, columns_at
from tersor.methods.solver import Problem

NUM_CODES = 256  # whose bits are told apart, from 0 on
MOST_BITS = 40.0


class TrellisRounder(ColumnRounder):
    """Rounds column after column to paths of a trellis.

    Args:
        num_states: of the trellis.
    """

    def __init__(
        self, problem: Problem, params: dict[str, Tensor], bit: float, kept: Bool[Tensor, "out in"], num_states: int
    ):
        super().__init__(problem, params, bit, kept)
        self.num_states = num_states

    @classmethod
    def through(
        cls,
        problem: Problem,
        rows: Float[Tensor, " out"],
        level: float,
        rate: float,
        kept: Bool[Tensor, "out in"],
        num_states: int,
    ) -> "TrellisRounder":
        """A rounder with steps for the error that `level` asks for; larger ones if codes would leave their range."""
        wider = 12 * NOISE[num_states]  # the square of what a step would be without a trellis
        columns = columns_at(problem, level) / wider**0.5
        largest = (problem.target.abs() / rows.unsqueeze(1)).amax(0)
        return cls(problem, scales(rows, columns.maximum(2 * largest / LARGEST)), rate * BIT * wider, kept, num_states)

    def choose(
        self, exact: Float[Tensor, " out"], deviation: Float[Tensor, " out"], kept: Bool[Tensor, " out"] | None
    ) -> Float[Tensor, " out"]:
        codes = best_paths(
            exact.cpu().numpy(),
            np.empty(0, np.bool_) if kept is None else kept.cpu().contiguous().numpy(),
            spreads_of(deviation).cpu().numpy() if self.bit else np.empty(0, np.int32),
            parity_bits(),
            self.bit,
            *predecessors(self.num_states),
            PATH,
        )
        return torch.from_numpy(codes).to(exact.device)


def spreads_of(deviation: Float[Tensor, " n"]) -> Tensor:
    """The number of each deviation's row in `parity_bits`, int32 `[n]`."""
    spread = (deviation.clamp_min(1e-30).log2() - MIN_OCTAVE) * PER_OCTAVE
    return spread.round().clamp(0, NUM_SPREADS - 1).to(torch.int32)


@cache
def parity_bits() -> Float[ndarray, "spread code"]:
    """Bits of the codes 0 to 255 and beyond at each of 64 deviations, where it is known whether a code is even."""
    deviation = torch.exp2(MIN_OCTAVE + torch.arange(NUM_SPREADS, dtype=torch.float64) / PER_OCTAVE)
    masses = code_masses(deviation, NUM_CODES)
    both = torch.where(torch.arange(NUM_CODES) > 0, 2, 1) * masses  # of a code and its negative
    totals = torch.stack([both[:, parity::2].sum(1) for parity in (0, 1)], 1).repeat(1, NUM_CODES // 2)
    bits = -(masses / totals.clamp_min(1e-30)).clamp_min(1e-30).log2()
    return bits.clamp_max(MOST_BITS).float().numpy()


@cache
def predecessors(num_states: int) -> tuple[Int32[ndarray, " state"], Int32[ndarray, " state"]]:
    """The states from which each is reached by a code whose second lowest bit is 0, and 1. The upper half of the states
    is reached from odd ones."""
    feed, back = taps(num_states)
    states = np.arange(num_states, dtype=np.int32)
    odd = (states >= num_states // 2).astype(np.int32)
    zero, one = (2 * (states ^ feed * bit ^ back * odd) + odd for bit in (0, 1))
    return zero, one


@compiled(
    "float32[::1](float32[::1], boolean[::1], int32[::1], float32[:, ::1], float32, int32[::1], int32[::1], int64)"
)
def best_paths(exact, kept, spreads, bits, bit, zero, one, path_rows):
    """The codes of a column: paths from state 0 in every `path_rows`-th row, with the least sum of `error^2`, and of
    `bit * bits` where that is above 0. Where `kept` is given and False, the code is 0."""
    num_rows, num_states = len(exact), len(zero)
    codes = np.empty(num_rows, np.float32)
    costs, next_costs = np.empty(num_states, np.float32), np.empty(num_states, np.float32)
    came = np.empty((path_rows, num_states), np.uint8)
    nearest, errors = np.empty((path_rows, 4), np.float32), np.empty(4, np.float32)
    half, most = num_states // 2, bits.shape[1] - 1
    for first in range(0, num_rows, path_rows):
        length = min(path_rows, num_rows - first)
        costs[:] = np.float32(np.inf)
        costs[0] = 0
        for row in range(length):
            value = min(max(exact[first + row], np.float32(8 - LARGEST)), np.float32(LARGEST - 8))
            for subset in range(4):
                code = np.float32(subset) + np.float32(4) * np.rint((value - np.float32(subset)) * np.float32(0.25))
                error = (value - code) * (value - code)
                if bit > 0:
                    row_bits = bits[spreads[first + row]]
                    lower = code - np.float32(4) if code > 0 else code + np.float32(4)  # the next one towards zero
                    cost = error + bit * row_bits[min(most, np.int64(abs(code)))]
                    other = (value - lower) * (value - lower) + bit * row_bits[min(most, np.int64(abs(lower)))]
                    code, error = (lower, other) if other < cost else (code, cost)
                if len(kept) and not kept[first + row]:
                    code = np.float32(0)
                    error = np.float32(0) if subset == 0 else np.float32(np.inf)
                nearest[row, subset], errors[subset] = code, error
            least = np.float32(np.inf)
            for state in range(num_states):
                odd = 1 if state >= half else 0
                straight, crossed = costs[zero[state]] + errors[odd], costs[one[state]] + errors[2 + odd]
                came[row, state] = crossed < straight
                next_costs[state] = min(straight, crossed)
                least = min(least, next_costs[state])
            for state in range(num_states):
                costs[state] = next_costs[state] - least
        state = int(np.argmin(costs))
        for row in range(length - 1, -1, -1):
            odd, crossed = 1 if state >= half else 0, came[row, state]
            codes[first + row] = nearest[row, 2 * crossed + odd]
            state = one[state] if crossed else zero[state]
    return codes
