from observed import SAMPLES, stats_of

from tersor.activations.observers.min_max import MinMax
from tersor.activations.quantizers import IntStatic
from tersor.calibration.moments import Moments


def test_it_is_the_range_of_everything_seen_not_of_the_sample():
    x = SAMPLES["heavy tails"].repeat(4, 1)  # 2,048 inputs, of which a sample keeps 512
    x[1234, 5] = 1e4
    moments = Moments(64, MinMax.needs)
    for part in x.split(100):
        moments.add(part)
    assert MinMax().range(moments.stats(), IntStatic(8)) == (x.min().item(), 1e4)


def test_nothing_seen_is_clipped():
    x = SAMPLES["an outlier"]
    params = IntStatic(8).fit(stats_of(x), MinMax())
    assert (IntStatic(8).fake_quantize(x, params) - x).abs().max() <= params["scale"].item() * 0.501 * 2
