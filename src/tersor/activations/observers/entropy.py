"""The range that keeps most of what the inputs' distribution says (Migacz 2017, "8-bit inference with TensorRT",
https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf).

For every range tried, P is the histogram with what lies outside moved to its ends. Q is what is left of it after
quantization: the mass of each code, without what was moved, spread evenly over the bins that the code stands for and
that hold anything. The range of least `KL(P || Q)` is taken. Exact zeros, which every range keeps, do not count.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations.observers.contract import CodeRange, histogram_of
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Entropy:
    """The range of least Kullback-Leibler divergence from the inputs' histogram."""

    name = "entropy"
    needs = frozenset({"histogram"})

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        values, counts = histogram_of(codes, stats)
        lowest, highest = min(values[0].item(), 0.0), max(values[-1].item(), 0.0)
        values, counts = values[values != 0].float(), counts[values != 0]
        if not len(values):
            return 0.0, 0.0
        limit = max(-lowest, highest)
        tried = [(max(lowest, -limit * share), min(highest, limit * share)) for share in SHARES]
        return min(tried, key=lambda ends: divergence(values, counts, codes, *ends))


SHARES = [1 - step / 128 for step in range(113)]  # of the largest magnitude


def divergence(
    values: Float[Tensor, " bin"], counts: Float[Tensor, " bin"], codes: CodeRange, low: float, high: float
) -> float:
    """`KL(P || Q)` in nats; infinite where nothing lies within the range."""
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return float("inf")
    kept, within = counts[inside], values[inside]
    clipped = kept.clone()
    clipped[0] += counts[values < low].sum()
    clipped[-1] += counts[values > high].sum()
    code = torch.unique_consecutive(codes.fake_quantize(within, codes.params(low, high)), return_inverse=True)[1]
    num_codes = int(code[-1]) + 1
    mass = torch.zeros(num_codes, dtype=kept.dtype).index_add_(0, code, kept)
    num_bins = torch.bincount(code, minlength=num_codes)
    p, q = clipped / clipped.sum(), (mass / num_bins)[code] / kept.sum()
    return (p * (p / q).log()).sum().item()
