"""Latency of several models side by side: in turn, in one process, on the same input.

Whatever else the machine does then falls on all of them alike, so the ratio is worth more than the milliseconds. The
ratio is the median over rounds of time(first) / time(other), with a bootstrap interval over rounds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call of one model, and how many times faster it is than the first.

    `speedup_interval` (95 %) that contains 1 means: no difference was measured.
    """

    batch_size: int
    num_threads: int
    num_rounds: int
    p50: float
    p95: float
    speedup: float
    speedup_interval: tuple[float, float]


def measure_latency(
    models: Sequence[nn.Module],
    run: Callable[[nn.Module], object],
    *,
    batch_size: int,
    num_threads: int = 1,
    seconds: float = 4.0,
    num_rounds: int = 60,
    seed: int = 0,
) -> list[Latency]:
    """Time `run(model)` for each model in turn.

    Args:
        run: one forward pass.
        batch_size: what `run` feeds, for the record.
        num_threads: CPU threads while timing; put back afterwards.
        seconds: stop after about this long, but never before 8 rounds.
        num_rounds: stop after this many rounds.
    """
    with torch.inference_mode(), threads(num_threads):
        for model in models:  # warm-up: caches, first-call set-up
            run(model)
            run(model)
        rounds: list[list[float]] = []
        started = time.perf_counter()
        while len(rounds) < num_rounds and (len(rounds) < 8 or time.perf_counter() - started < seconds):
            rounds.append([timed(run, model) for model in models])
    times = np.array(rounds)
    ratios = times[:, :1] / times
    picks = np.random.default_rng(seed).integers(0, len(times), (1000, len(times)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5], axis=0)
    return [
        Latency(
            batch_size=batch_size,
            num_threads=num_threads,
            num_rounds=len(times),
            p50=float(np.median(times[:, i]) * 1e3),
            p95=float(np.percentile(times[:, i], 95) * 1e3),
            speedup=float(np.median(ratios[:, i])),
            speedup_interval=(float(low[i]), float(high[i])),
        )
        for i in range(len(models))
    ]


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Run on this many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(run: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run(model)
    return time.perf_counter() - started
