"""The range whose rounding and clipping cost least, by the power of the error that is summed.

`mse` sums squares (Choukroun et al. 2019, https://arxiv.org/abs/1902.06822), over all inputs of the calibration data.
`cubed-error` sums cubes: what is rare and far away matters more to a transformer than its square says. It looks at the
sample of calibration inputs, and at one more token that has every feature's largest value.

Both shrink the widest range first as a whole, then either end alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations.observers.contract import CodeRange, histogram_of, seen
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class LeastSquares:
    """The range of least squared error over all inputs."""

    name = "mse"
    needs = frozenset({"histogram"})

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        values, counts = histogram_of(codes, stats).float()
        return search(values, error_of(values, counts, codes, 2))


@dataclass(frozen=True)
class CubedError:
    """The range of least cubed error over a sample and the extremes of every feature."""

    name = "cubed-error"
    needs = frozenset({"sample", "largest"})

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        x = seen(codes, stats.sample).float()
        if stats.largest is not None:
            x = torch.cat([x, extremes(x, seen(codes, stats.largest))])
        values, counts = summary(x)
        return search(values, error_of(values, counts, codes, 3))


SHRINKS = [1 - step / 40 for step in range(32)]  # ranges tried, as a share of the widest
NUM_OUTER = 1024  # values at either end of a sample that are kept one by one, at least


def error_of(
    values: Float[Tensor, " n"], counts: Float[Tensor, " n"], codes: CodeRange, power: int
) -> Callable[[float, float], float]:
    """The summed error of a range."""

    def error(low: float, high: float) -> float:
        return ((codes.fake_quantize(values, codes.params(low, high)) - values).abs().pow(power) @ counts).item()

    return error


def search(values: Float[Tensor, " n"], error: Callable[[float, float], float]) -> tuple[float, float]:
    """Shrink both ends alike, then each alone; `values` are in order."""
    lowest, highest = min(values[0].item(), 0.0), max(values[-1].item(), 0.0)
    best = min(SHRINKS, key=lambda s: error(lowest * s, highest * s))
    high = highest * best
    low = min((lowest * s for s in SHRINKS), key=lambda end: error(end, high))
    return low, min((highest * s for s in SHRINKS), key=lambda end: error(low, end))


def extremes(x: Float[Tensor, "token in"], largest: Float[Tensor, " in"]) -> Float[Tensor, "1 in"]:
    """The largest magnitudes that calibration saw, with the signs of those in the sample."""
    signs = torch.where(x.amax(0) >= -x.amin(0), 1.0, -1.0)
    return (signs * largest.to(x)).unsqueeze(0)


def summary(x: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """A sample's values in order, with their counts; all but the outer ones are averaged over runs of neighbours."""
    values = x.flatten().sort().values
    ones = torch.ones_like(values[: 2 * NUM_OUTER])
    length = (len(values) - 2 * NUM_OUTER) // (2 * NUM_OUTER)  # of a run
    if length < 2:
        return values, torch.ones_like(values)
    num_outer = len(values) - 2 * NUM_OUTER * length
    first, inner, last = values.split([num_outer // 2, 2 * NUM_OUTER * length, num_outer - num_outer // 2])
    means = inner.view(-1, length).mean(1)
    return torch.cat([first, means, last]), torch.cat([torch.ones_like(first), length * ones, torch.ones_like(last)])
