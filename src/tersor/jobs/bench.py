"""Several models, each in its own runtime, timed in turn on the same inputs, with the memory each takes.

The first is also timed against itself. What that ratio shows is noise, and a difference that lies within it is not
called one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.layout import packed_sites
from tersor.checkpoint.open import ModelSpec
from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.core.threads import threads
from tersor.jobs.settings import Timing
from tersor.measure.latency import USUAL, Latency, TimeLimit, expected, measure_calls
from tersor.measure.memory import Memory, measure_opened
from tersor.measure.scorecard import BATCH_SIZES
from tersor.report.hints import slow_here
from tersor.runtimes import Feeds, Session, open_session, runtime_for
from tersor.runtimes.exactness import exactness
from tersor.runtimes.feeds import LENGTH, feeds_from, synthetic_feeds
from tersor.runtimes.torch import TorchSession
from tersor.tasks import Batch
from tersor.tasks.data import Data

Noise = tuple[float, float]  # an interval of the ratio of two times of the same model
CACHE = ("past_key_values", "beam_idx")  # how the inputs of a language model's cache begin


@dataclass(frozen=True)
class Candidate:
    """A model and what runs it.

    Attributes:
        weights: state dict or artifact folder of a model given as `package.module:factory`.
        dtype: type that PyTorch computes in; None: the type it was saved in.
    """

    model: str
    runtime: str
    weights: Path | None = None
    dtype: torch.dtype | None = None

    def open(self, num_threads: int) -> Session:
        """Raises as `open_session` does."""
        return open_session(self.model, self.runtime, num_threads=num_threads, weights=self.weights, dtype=self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "runtime": self.runtime,
            "weights": self.weights and str(self.weights),
            "dtype": self.dtype and str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class MadeUp:
    """Made-up inputs.

    Attributes:
        length: tokens, or steps, of an example; 128 if not given.
        shape: shape of one example, where the models leave it open.
    """

    length: int | None = None
    shape: Sequence[int] | None = None

    @property
    def is_given(self) -> bool:
        """True if anything was chosen."""
        return self.length is not None or self.shape is not None

    def feeds(self, session: Session, batch_size: int, seed: int = 0) -> Feeds:
        """Made-up inputs of one batch for a session, by name."""
        length = LENGTH if self.length is None else self.length
        return synthetic_feeds(session.inputs, batch_size=batch_size, length=length, shape=self.shape, seed=seed)


@dataclass(frozen=True)
class Timed:
    """One candidate at one batch size and number of threads. `difference` is from the first."""

    candidate: Candidate
    latency: Latency
    difference: str


@dataclass(frozen=True)
class Bench:
    """The measurements of one benchmark: times, noise and memory of all candidates.

    Attributes:
        timings: batch sizes within thread counts, the candidates of each in their order.
        noise: 95 % interval of the first against itself, for each batch size and thread count in the same order.
        memory: of each candidate, at the largest batch; None if it was not asked for or the system does not report it.
        inputs: a sentence on where the inputs came from, and their shapes at each batch size.
        untimed: a sentence for each batch size that there was no time for.
        exactness: for each file of int8 products, a sentence on whether this processor computes them exactly.
    """

    timings: tuple[Timed, ...]
    noise: tuple[tuple[float, float], ...]
    memory: tuple[Memory | None, ...]
    inputs: str
    versions: tuple[str, ...]
    untimed: tuple[str, ...] = ()
    exactness: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for timing, of in zip(found["timings"], self.timings, strict=True):
            timing["candidate"] = of.candidate.to_dict()
        return found


def candidates_of(models: Sequence[ModelSpec | str], runtimes: Sequence[str] = ()) -> list[Candidate]:
    """Each model with its runtime: one name for all, one for each, or none, and the file decides."""
    if len(runtimes) > 1 and len(runtimes) != len(models):
        raise InputError(f"{len(runtimes)} --runtime for {len(models)} models; give one for all, or one for each")
    specs = [model if isinstance(model, ModelSpec) else ModelSpec(model) for model in models]
    names: Sequence[str | None] = runtimes or [None]
    names = names if len(names) == len(models) else [names[0]] * len(models)
    return [
        Candidate(model.name, runtime_for(model.name, name).name, model.weights, model.dtype)
        for model, name in zip(specs, names, strict=True)
    ]


def inputs_of(made_up: MadeUp, data: Data) -> MadeUp | Data:
    """The one of the two that was chosen. Raises InputError where both were."""
    if data.is_given and made_up.is_given:
        raise InputError("--length and --shape are for made-up inputs, and --task and --data bring their own")
    return data if data.is_given else made_up


def bench(
    candidates: Sequence[Candidate],
    inputs: MadeUp | Data = MadeUp(),
    timing: Timing = Timing(),
    seed: int = 0,
    events: Events = Events(),
) -> Bench:
    """Time the candidates in turn.

    Args:
        inputs: made up, or a task's examples.

    Raises InputError for inputs that a model does not take, ModelError for one that cannot be opened, MissingExtra for
    a runtime that is not installed.
    """
    found = Times(timing, len(candidates))
    for num_threads in timing.threads:
        sessions = [candidate.open(num_threads) for candidate in candidates]
        check_no_cache(candidates, sessions)
        if num_threads == timing.threads[0]:
            for candidate, session in zip(candidates, sessions, strict=True):
                for note in slow_here([candidate.model] if rounds_inputs(session) else []):
                    events.on_note(note)
        description, fed = feeds_for(sessions, inputs, sorted(timing.batch_sizes or BATCH_SIZES), seed)
        latencies: Sequence[Latency] = []
        for batch_size, feeds in fed.items():
            events.on_progress("timing", found.done, found.whole)
            if not found.has_time_for(batch_size, latencies):
                continue
            calls = [partial(session.run, feed) for session, feed in zip(sessions, feeds, strict=True)]
            latencies = found.measure(candidates, calls, batch_size, num_threads, seed)
            largest = feeds
    opened: list[Memory | None] = []
    for candidate, feed in zip(candidates, largest, strict=True):
        events.on_progress("timing", found.done, found.whole)
        opened.append(memory_of(candidate, feed, timing))
        found.done += timing.memory
    events.on_progress("timing", found.whole, found.whole)
    shapes = "; ".join(f"{name} {list(array.shape)}" for name, array in largest[0].items())
    versions = dict.fromkeys(runtime_for(c.model, c.runtime).version() for c in candidates)
    of = f"{description}: {shapes}"
    for sentence in found.untimed:
        events.on_note(sentence)
    exact = tuple(f"{c.model}: {known}" for c in candidates if (known := exactness(Path(c.model))) is not None)
    for sentence in exact:
        events.on_note(sentence)
    measured = tuple(found.timings), tuple(found.noises), tuple(opened)
    return Bench(*measured, of, tuple(versions), tuple(found.untimed), exact)


def rounds_inputs(session: Session) -> bool:
    """True for a model in PyTorch some of whose layers multiply integers."""
    return isinstance(session, TorchSession) and any(found for *_, found in packed_sites(session.model))


class Times:
    """The times of a benchmark as they are found, within the seconds that timing may take."""

    def __init__(self, timing: Timing, num_candidates: int):
        self.timing, self.timings, self.noises, self.untimed = timing, list[Timed](), list[Noise](), list[str]()
        self.num_left = len(timing.threads) * len(timing.batch_sizes or BATCH_SIZES)
        self.done, self.whole = 0, self.num_left + timing.memory * num_candidates
        seconds = timing.seconds
        self.limit = TimeLimit(None if seconds is None else seconds * num_candidates * self.num_left)

    def has_time_for(self, batch_size: int, latencies: Sequence[Latency]) -> bool:
        """False for a batch that would take too long, going by smaller ones; that is noted."""
        refusal = self.limit.refusal(f"batch {batch_size}", expected(latencies, batch_size))
        self.done, self.num_left = self.done + 1, self.num_left - 1
        if self.timing.seconds is not None or refusal is None:
            return True
        self.untimed.append(f"{refusal}; --seconds {math.ceil(expected(latencies, batch_size))} times it")
        return False

    def measure(
        self,
        candidates: Sequence[Candidate],
        calls: Sequence[Callable[[], object]],
        batch_size: int,
        num_threads: int,
        seed: int,
    ) -> list[Latency]:
        """Time one call of each candidate, and the first against itself."""
        usual, most = self.limit.share(self.num_left + 1, USUAL * len(calls))
        with threads(num_threads), self.limit.counting():
            *latencies, again = measure_calls(
                [*calls, calls[0]],
                batch_size=batch_size,
                num_threads=num_threads,
                seconds=usual,
                most_seconds=most if self.timing.seconds is None else math.inf,
                seed=seed,
                clock=self.timing.clock,
            )
        noise = again.speedup_interval
        self.noises.append(noise)
        for candidate, latency in zip(candidates, latencies, strict=True):
            self.timings.append(Timed(candidate, latency, latency.difference(noise)))
        return latencies


def memory_of(candidate: Candidate, feeds: Feeds, timing: Timing, decode: bool = False) -> Memory | None:
    """Memory of a candidate in a process of its own; None if not asked for or not reported."""
    if not timing.memory:
        return None
    return measure_opened(
        candidate.model,
        candidate.runtime,
        feeds,
        weights=candidate.weights,
        dtype=candidate.dtype,
        num_threads=timing.threads[0],
        decode=decode,
    )


def check_no_cache(candidates: Sequence[Candidate], sessions: Sequence[Session]) -> None:
    """Raises InputError for a language model with a cache, which runs token by token."""
    for candidate, session in zip(candidates, sessions, strict=True):
        if any(each.name.startswith(CACHE) for each in session.inputs) or candidate.runtime == "llama.cpp":
            raise InputError(
                f"{candidate.model} is a language model with a cache: measure how fast it writes with "
                f"--new-tokens 64, or export it with --no-cache"
            )


def feeds_for(
    sessions: Sequence[Session], inputs: MadeUp | Data, batch_sizes: Sequence[int], seed: int
) -> tuple[str, dict[int, list[Feeds]]]:
    """A sentence on where the inputs come from, and for each batch size the inputs of every session in order.

    With fewer examples than a batch asks for, the batch is smaller.
    """
    fed: dict[int, list[Feeds]] = {}
    if isinstance(inputs, MadeUp):
        for batch_size in batch_sizes:
            fed[batch_size] = [inputs.feeds(session, batch_size, seed) for session in sessions]
        return "made-up inputs", fed
    sources = (each.source for each in sessions if isinstance(each, TorchSession))
    task = inputs.open(next(filter(None, sources), None))
    for batch_size in batch_sizes:
        batch = next(iter(task.batches("eval", batch_size=batch_size)))
        if not isinstance(batch, Batch):
            raise InputError(f"task '{task.name}' gives batches of its own kind, which only it can run")
        each: list[Feeds] = [feeds_from(batch.inputs, session.inputs) for session in sessions]
        fed[len(next(iter(each[0].values())))] = each
    return task.description, fed
