import math

import pytest
import torch
from observed import SAMPLES, stats_of

from tersor.activations.observers.entropy import Entropy, divergence
from tersor.activations.quantizers import IntStatic


def textbook(x, codes, low, high):
    """KL of two histograms of the numbers themselves, bin by bin in Python."""
    values, counts = (row.tolist() for row in stats_of(x).histogram)
    bins = {v: c for v, c in zip(values, counts, strict=True) if v != 0}
    inside = [v for v in bins if low <= v <= high]
    p = {v: bins[v] for v in inside}
    p[inside[0]] += sum(c for v, c in bins.items() if v < low)
    p[inside[-1]] += sum(c for v, c in bins.items() if v > high)
    codes_of = dict(
        zip(inside, codes.fake_quantize(torch.tensor(inside), codes.params(low, high)).tolist(), strict=True)
    )
    q = {}
    for v in inside:
        sharing = [u for u in inside if codes_of[u] == codes_of[v]]
        q[v] = sum(bins[u] for u in sharing) / len(sharing)
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[v] / total_p * math.log((p[v] / total_p) / (q[v] / total_q)) for v in inside)


@pytest.mark.parametrize("ends", [(-4.0, 4.0), (-1.5, 2.0), (-0.5, 0.5)])
def test_the_divergence_is_the_textbooks(ends):
    x = SAMPLES["gaussian"][:16]
    values, counts = stats_of(x).histogram
    kept = values != 0
    found = divergence(values[kept].float(), counts[kept], IntStatic(4), *ends)
    assert found == pytest.approx(textbook(x, IntStatic(4), *ends), rel=1e-5)


def test_a_far_outlier_is_clipped():
    x = torch.cat([SAMPLES["gaussian"]] * 4)
    x[7, 7] = 100
    assert Entropy().range(stats_of(x), IntStatic(8))[1] < 20
