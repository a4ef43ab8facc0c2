"""Latency of several models side by side: in turn, in one process, on the same input.

Whatever else the machine does then falls on all of them alike, so the ratio is worth more than the milliseconds. The
ratio is the median over rounds of time(first) / time(other), with a bootstrap interval over rounds; where there are
too few of them for that, Student's t on their logarithms.

Timing never takes long: a `TimeLimit` is shared out over all that a job times, by default as many seconds as the work
that the numbers are about, and at most a minute.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t
from torch import nn

from tersor.core.threads import threads

MINUTE = 60.0  # seconds that timing takes at most, where nobody asked for more
USUAL = 4.0  # seconds in which enough rounds are made, mostly
FEWEST = 8  # rounds; a bootstrap of fewer gives too narrow an interval
MOST = 60  # rounds


def now() -> float:
    """Elapsed time in seconds (wall clock)."""
    return time.perf_counter()


class TimeLimit:
    """The seconds that all timing of a job may take together.

    Args:
        seconds: limit in all; None is a minute.
        work: seconds that the work took which the timing is about. Unless `seconds` says otherwise, timing takes no
            longer, or a second.
        clock: function that returns the time in seconds.
    """

    def __init__(self, seconds: float | None = None, work: float = MINUTE, clock: Callable[[], float] = now):
        self.asked, self.clock = seconds is not None, clock
        self.left = min(MINUTE, max(1.0, work)) if seconds is None else seconds

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context whose duration counts as time spent on timing."""
        started = self.clock()
        try:
            yield
        finally:
            self.left -= self.clock() - started

    def share(self, num_left: int, usual: float = USUAL) -> tuple[float, float]:
        """The `seconds` and `most_seconds` of the next of `num_left` measurements: `usual`, unless more were asked for,
        and no more than are left for each."""
        fair = max(0.0, self.left) / num_left
        return (fair if self.asked else min(usual, fair)), fair

    def refusal(self, what: str, seconds: float) -> str | None:
        """A sentence that says why `what`, which takes so many seconds or more, is not timed; None if there is time."""
        if seconds <= self.left:
            return None
        left = max(0.0, self.left)
        return f"{what} is not timed: it would take {seconds:.0f} s or more, and {left:.0f} s are left for timing"


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call of one model, and how many times faster it is than the first.

    `speedup_interval` (95 %) that contains 1 means: no difference was measured.

    Attributes:
        spread: distance between the quartiles, as a share of the median.
        work: what a call is: a `pass` over a batch, the `prompt` of a language model, or one new `token`.
        tokens_per_second: speed of a prompt or of new tokens, all rows of the batch together; None for a pass.
    """

    batch_size: int
    num_threads: int
    num_rounds: int
    p50: float
    p95: float
    speedup: float
    speedup_interval: tuple[float, float]
    spread: float = 0.0
    work: str = "pass"
    tokens_per_second: float | None = None

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
    seconds: float = USUAL,
    most_seconds: float | None = None,
    num_rounds: int = MOST,
) -> list[Latency]:
    """Time `run(model)` for each model in turn.

    Args:
        run: one forward pass.
        batch_size: batch size that `run` feeds, for the record.
        num_threads: CPU threads while timing; put back afterwards.
        seconds: make no round that would end later than this, counted from now.
        most_seconds: the same for the first eight rounds; None is `seconds`. Each model is called twice at least.
        num_rounds: stop after this many rounds.
    """
    with torch.inference_mode(), threads(num_threads):
        return measure_calls(
            [partial(run, model) for model in models],
            batch_size=batch_size,
            num_threads=num_threads,
            seconds=seconds,
            most_seconds=most_seconds,
            num_rounds=num_rounds,
        )


def measure_calls(
    calls: Sequence[Callable[[], object]],
    *,
    batch_size: int,
    num_threads: int = 1,
    seconds: float = USUAL,
    most_seconds: float | None = None,
    num_rounds: int = MOST,
    seed: int = 0,
    clock: Callable[[], float] = now,
    before: Sequence[Callable[[], object]] | None = None,
    wall: Callable[[], float] = now,
) -> list[Latency]:
    """Time anything that can be called, in turn; the arguments are those of `measure_latency`, and `num_threads` is for
    the record alone. In every round the order is drawn anew, so that none always runs in the caches of the same other.

    Args:
        clock: `time.process_time` counts what the processor did for this process, whatever else it was busy with.
        before: function that is called, untimed, before every single one of `calls`.
        wall: what `seconds` are counted by.
    """
    generator = np.random.default_rng(seed)
    ready = before or [nothing] * len(calls)
    started = wall()

    def one_round() -> tuple[list[float], float]:
        """Call each once. Returns the seconds of each by `clock`, and of all by `wall`."""
        began, spent = wall(), [0.0] * len(calls)
        for i in generator.permutation(len(calls)):
            ready[i]()
            spent[i] = timed(calls[i], clock)
        return spent, wall() - began

    cold, longest = one_round()  # the first call of each sets up caches and chooses kernels
    most_seconds = seconds if most_seconds is None else most_seconds
    if wall() - started + (FEWEST + 1) * longest <= most_seconds:
        longest = one_round()[1]
    rounds: list[list[float]] = []
    while len(rounds) < num_rounds:
        if rounds and wall() - started + longest > (seconds if len(rounds) >= FEWEST else most_seconds):
            break
        spent, took = one_round()
        longest = max(longest, took) if rounds else took
        rounds.append(spent)
    times = np.array(rounds if len(rounds) > 1 else [cold, *rounds])
    ratios = times[:, :1] / times
    low, high = ratio_interval(ratios, generator)
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


def expected(latencies: Sequence[Latency], batch_size: int, num_calls: int = 2) -> float:
    """Seconds of `num_calls` calls of each model with another batch, taken to be in proportion; zero where nothing is
    known yet."""
    return num_calls * sum(each.p50 / 1e3 * batch_size / each.batch_size for each in latencies)


def ratio_interval(
    ratios: Float[np.ndarray, "round call"], generator: np.random.Generator
) -> tuple[Float[np.ndarray, " call"], Float[np.ndarray, " call"]]:
    """95 % intervals of the median ratios, from two rounds or more."""
    num_rounds = len(ratios)
    if num_rounds >= FEWEST:
        picks = generator.integers(0, num_rounds, (1000, num_rounds))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5], axis=0)
        return low, high
    logs = np.log(ratios)
    margin = t.ppf(0.975, num_rounds - 1) * logs.std(axis=0, ddof=1) / np.sqrt(num_rounds)
    return np.exp(logs.mean(axis=0) - margin), np.exp(logs.mean(axis=0) + margin)


def nothing() -> None:
    """Do nothing."""


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds that one call takes."""
    started = clock()
    call()
    return clock() - started
