"""Several models, each in its own runtime, timed in turn on the same inputs, with the memory each takes.

The first is also timed against itself. What that ratio shows is noise, and a difference that lies within it is not
called one.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import InputError
from tersor.core.progress import Progress, silent
from tersor.core.threads import threads
from tersor.jobs.task_choice import TaskChoice, open_task_for
from tersor.measure.latency import USUAL, Latency, TimeLimit, expected, measure_calls, now
from tersor.measure.memory import Memory, measure_opened
from tersor.runtimes import Session, open_session, runtime_for
from tersor.runtimes.feeds import LENGTH, feeds_from, synthetic_feeds
from tersor.runtimes.torch import TorchSession
from tersor.tasks import Batch, open_task

CACHE = ("past_key_values", "beam_idx")  # how the inputs of a language model's cache begin


@dataclass(frozen=True)
class Candidate:
    """A model and what runs it. `weights` fill a model given as `package.module:factory`."""

    model: str
    runtime: str
    weights: Path | None = None


@dataclass(frozen=True)
class Timing:
    """One candidate at one batch size and number of threads. `difference` is from the first."""

    candidate: Candidate
    latency: Latency
    difference: str


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        timings: batch sizes within thread counts, the candidates of each in their order.
        noise: 95 % interval of the first against itself, for each batch size and thread count in the same order.
        memory: of each candidate, at the largest batch; None where it was not asked for or the kernel does not tell.
        inputs: where they came from, and their shapes at each batch size.
        untimed: a sentence for each batch size that there was no time for.
    """

    timings: tuple[Timing, ...]
    noise: tuple[tuple[float, float], ...]
    memory: tuple[Memory | None, ...]
    inputs: str
    versions: tuple[str, ...]
    untimed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for timing in found["timings"]:
            timing["candidate"]["weights"] = timing["candidate"]["weights"] and str(timing["candidate"]["weights"])
        return found


def candidates_of(models: Sequence[str], runtimes: Sequence[str] = (), weights: Sequence[Path] = ()) -> list[Candidate]:
    """Each model with its runtime: one name for all, one for each, or none, and the file decides."""
    if len(runtimes) > 1 and len(runtimes) != len(models):
        raise InputError(f"{len(runtimes)} --runtime for {len(models)} models; give one for all, or one for each")
    factories = [model for model in models if ":" in model and not Path(model).exists()]
    if len(weights) > len(factories):
        raise InputError(
            f"{len(weights)} --weights for {len(factories)} models given as package.module:factory; one each"
        )
    files = iter([*weights, *[None] * len(models)])
    names: Sequence[str | None] = runtimes or [None]
    names = names if len(names) == len(models) else [names[0]] * len(models)
    return [
        Candidate(model, runtime_for(model, name).name, next(files) if model in factories else None)
        for model, name in zip(models, names, strict=True)
    ]


def bench(
    candidates: Sequence[Candidate],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    thread_counts: Sequence[int] = (1,),
    length: int | None = None,
    shape: Sequence[int] | None = None,
    task_choice: TaskChoice | None = None,
    seconds: float | None = None,
    memory: bool = True,
    cpu_time: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Bench:
    """Time the candidates in turn.

    Args:
        length: tokens, or steps, of a made-up example; 128 if not given.
        shape: of one made-up example, where the models leave it open.
        task_choice: whose examples to run on; None makes inputs up.
        seconds: about how long to time each batch size and thread count, per candidate; None is 4, but no more than a
            minute in all, and larger batches that would take longer are left out.
        cpu_time: whether to time the processor's work for this process rather than the clock on the wall: for one
            thread on a machine that has other work.
        memory: whether to open each once more, in a process of its own.

    Raises InputError for inputs that a model does not take, ModelError for one that cannot be opened, MissingExtra for
    a runtime that is not installed.
    """
    if task_choice is not None and (length is not None or shape is not None):
        raise InputError("--length and --shape are for made-up inputs, and --task and --data bring their own")
    if cpu_time and max(thread_counts) > 1:
        raise InputError("--cpu-time adds up all threads, so it says nothing of several; use it with --threads 1")
    timings: list[Timing] = []
    noises: list[tuple[float, float]] = []
    untimed: list[str] = []
    num_left = len(thread_counts) * len(batch_sizes)
    done, whole = 0, num_left + memory * len(candidates)
    limit = TimeLimit(None if seconds is None else seconds * len(candidates) * num_left)
    for num_threads in thread_counts:
        sessions = [open_session(c.model, c.runtime, num_threads=num_threads, weights=c.weights) for c in candidates]
        for candidate, session in zip(candidates, sessions, strict=True):
            if any(each.name.startswith(CACHE) for each in session.inputs) or candidate.runtime == "llama.cpp":
                raise InputError(
                    f"{candidate.model} is a language model with a cache: measure how fast it writes with "
                    f"--new-tokens 64, or export it with --no-cache"
                )
        source = Feeder(sessions, length or LENGTH, shape, task_choice, seed)
        fed = {}
        for batch_size in sorted(batch_sizes):
            each = [source.feeds(session, batch_size) for session in sessions]
            fed[len(next(iter(each[0].values())))] = each  # few examples give smaller batches than were asked for
        latencies: list[Latency] = []
        for batch_size, feeds in fed.items():
            progress("timing", done, whole)
            refusal = limit.refusal(f"batch {batch_size}", expected(latencies, batch_size))
            done, num_left = done + 1, num_left - 1
            if seconds is None and refusal is not None:
                untimed.append(f"{refusal}; --seconds {math.ceil(expected(latencies, batch_size))} times it")
                continue
            calls = [partial(session.run, feed) for session, feed in zip(sessions, feeds, strict=True)]
            usual, most = limit.share(num_left + 1, USUAL * len(calls))
            with threads(num_threads), limit.counting():
                *latencies, again = measure_calls(
                    [*calls, calls[0]],
                    batch_size=batch_size,
                    num_threads=num_threads,
                    seconds=usual,
                    most_seconds=most if seconds is None else math.inf,
                    seed=seed,
                    clock=time.process_time if cpu_time else now,
                )
            noise = again.speedup_interval
            noises.append(noise)
            for candidate, latency in zip(candidates, latencies, strict=True):
                timings.append(Timing(candidate, latency, latency.difference(noise)))
            largest = feeds
    opened: list[Memory | None] = []
    for candidate, feed in zip(candidates, largest, strict=True):
        progress("timing", done, whole)
        asked = partial(measure_opened, candidate.model, candidate.runtime, feed, weights=candidate.weights)
        opened.append(asked(num_threads=thread_counts[0]) if memory else None)
        done += memory
    progress("timing", whole, whole)
    shapes = "; ".join(f"{name} {list(array.shape)}" for name, array in largest[0].items())
    versions = dict.fromkeys(runtime_for(c.model, c.runtime).version() for c in candidates)
    inputs = f"{source.description}: {shapes}"
    return Bench(tuple(timings), tuple(noises), tuple(opened), inputs, tuple(versions), tuple(untimed))


class Feeder:
    """The source of a benchmark's inputs: made up, or a task's examples."""

    def __init__(
        self,
        sessions: Sequence[Session],
        length: int = LENGTH,
        shape: Sequence[int] | None = None,
        task_choice: TaskChoice | None = None,
        seed: int = 0,
    ):
        self.length, self.shape, self.seed, self.task = length, shape, seed, None
        self.description = "made-up inputs"
        if task_choice is not None:
            folder = next((s.source for s in sessions if isinstance(s, TorchSession) and s.source is not None), None)
            choice = task_choice
            if folder is not None:
                self.task = open_task_for(folder, choice)
            else:
                self.task = open_task(
                    choice.task, choice.data, calibration=choice.calibration, options=choice.options, train=choice.train
                )
            self.description = self.task.description

    def feeds(self, session: Session, batch_size: int) -> Mapping[str, np.ndarray]:
        """Inputs for one session."""
        if self.task is None:
            return synthetic_feeds(
                session.inputs, batch_size=batch_size, length=self.length, shape=self.shape, seed=self.seed
            )
        batch = next(iter(self.task.batches("eval", batch_size=batch_size)))
        if not isinstance(batch, Batch):
            raise InputError(f"task '{self.task.name}' gives batches of its own kind, which only it can run")
        return feeds_from(batch.inputs, session.inputs)
