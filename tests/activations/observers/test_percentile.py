import pytest
import torch
from observed import SAMPLES, stats_of

from tersor.activations.observers.percentile import Percentile
from tersor.activations.quantizers import IntStatic


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "negative", "after relu"])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 100])
def test_it_is_the_quantile_to_within_a_bin(kind, percentile):
    x = SAMPLES[kind]
    low, high = Percentile(percentile).range(stats_of(x), IntStatic(8))
    outside, width = (1 - percentile / 100) / 2 * x.numel(), 2 * x.abs().max().item() / 2**12
    for end, tail in ((low, x), (-high, -x)):
        if end:  # else zero, which every range holds
            assert (tail < end - width).sum() <= outside
            assert (tail < end + width).sum() >= outside


def test_one_outlier_in_a_hundred_thousand_is_clipped():
    x = torch.cat([SAMPLES["gaussian"]] * 4)
    x[7, 7] = 1000
    assert Percentile().range(stats_of(x), IntStatic(8))[1] < 6
