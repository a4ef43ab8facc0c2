"""Inputs of the kinds that observers meet, and the statistics calibration gathers of them."""

import torch

from tersor.calibration.moments import Moments

EVERYTHING = frozenset({"sample", "largest", "ranges", "histogram"})


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SAMPLES = {
    "gaussian": random(512, 64),
    "heavy tails": random(512, 64) / random(512, 64, seed=1).abs().clamp_min(0.02),
    "shifted": random(512, 64) + 5,
    "negative": -random(512, 64).abs(),
    "after relu": random(512, 64).relu(),
    "an outlier": torch.cat([random(511, 64), 40 + 0 * random(1, 64)]),
    "zeros": torch.zeros(512, 64),
}


def stats_of(x):
    moments = Moments(x.shape[1], EVERYTHING)
    moments.add(x)
    return moments.stats()
