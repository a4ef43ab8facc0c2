"""Latency of several models side by side: in turn, in one process, on the same input.

Whatever else the machine does then falls on all of them alike, so the ratio is worth more than the milliseconds. The
ratio is the median over rounds of time(first) / time(other), with a bootstrap interval over rounds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from tersor.core.threads import threads


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call of one model, and how many times faster it is than the first.

    `speedup_interval` (95 %) that contains 1 means: no difference was measured. `spread` is what lies between the
    quartiles, as a share of the median.
    """

    batch_size: int
    num_threads: int
    num_rounds: int
    p50: float
    p95: float
    speedup: float
    speedup_interval: tuple[float, float]
    spread: float = 0.0

    def difference(self, noise: tuple[float, float] = (1.0, 1.0)) -> str:
        """`faster`, `slower`, or `no difference measured`: where the interval reaches into that of the first model
        against itself, `noise`."""
        low, high = self.speedup_interval
        if low > max(1.0, noise[1]):
            return "faster"
        return "slower" if high < min(1.0, noise[0]) else "no difference measured"


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
        return measure_calls(
            [partial(run, model) for model in models],
            batch_size=batch_size,
            num_threads=num_threads,
            seconds=seconds,
            num_rounds=num_rounds,
            seed=seed,
        )


def measure_calls(
    calls: Sequence[Callable[[], object]],
    *,
    batch_size: int,
    num_threads: int = 1,
    seconds: float = 4.0,
    num_rounds: int = 60,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    before: Sequence[Callable[[], object]] | None = None,
) -> list[Latency]:
    """Time anything that can be called, in turn; the arguments are those of `measure_latency`, and `num_threads` is for
    the record alone. In every round the order is drawn anew, so that none always runs in the caches of the same other.

    Args:
        clock: `time.process_time` counts what the processor did for this process, whatever else it was busy with.
        before: what is called, untimed, before every single one of `calls`.
    """
    generator = np.random.default_rng(seed)
    ready = before or [nothing] * len(calls)
    for each, call in zip(ready, calls, strict=True):  # warm-up: caches, first-call set-up
        for _ in range(2):
            each()
            call()
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < num_rounds and (len(rounds) < 8 or time.perf_counter() - started < seconds):
        spent = [0.0] * len(calls)
        for i in generator.permutation(len(calls)):
            ready[i]()
            spent[i] = timed(calls[i], clock)
        rounds.append(spent)
    times = np.array(rounds)
    ratios = times[:, :1] / times
    picks = generator.integers(0, len(times), (1000, len(times)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5], axis=0)
    p25, p50, p75, p95 = np.percentile(times, [25, 50, 75, 95], axis=0)
    return [
        Latency(
            batch_size=batch_size,
            num_threads=num_threads,
            num_rounds=len(times),
            p50=float(p50[i] * 1e3),
            p95=float(p95[i] * 1e3),
            speedup=float(np.median(ratios[:, i])),
            speedup_interval=(float(low[i]), float(high[i])),
            spread=float((p75[i] - p25[i]) / p50[i]),
        )
        for i in range(len(calls))
    ]


def nothing() -> None:
    """To be called where there is nothing to do."""


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    started = clock()
    call()
    return clock() - started
