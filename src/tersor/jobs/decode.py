"""Speed of text generation in tokens per second at batch 1: language models, each in its own runtime, timed in turn.

All read the same prompt. measure/decoding.py describes how they are timed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.core.threads import threads
from tersor.jobs.bench import Candidate, memory_of
from tersor.jobs.settings import Timing
from tersor.measure.decoding import measure_decoding
from tersor.measure.latency import USUAL, Latency, TimeLimit
from tersor.measure.memory import Memory
from tersor.runtimes import open_decoder, runtime_for
from tersor.runtimes.feeds import NUM_TOKENS


@dataclass(frozen=True)
class DecodeTiming:
    """One candidate at one number of threads.

    Attributes:
        prompt: reading the prompt at once.
        token: one new token; the mean over those of a round.
        tokens_per_second: speed of the median round.
        difference: speed of generating tokens, compared with the first candidate.
    """

    candidate: Candidate
    prompt: Latency
    token: Latency
    tokens_per_second: float
    difference: str


@dataclass(frozen=True)
class DecodeBench:
    """The measurements of one benchmark of text generation.

    Attributes:
        timings: the candidates in their order, within thread counts.
        noise: 95 % interval of the first against itself, for each thread count.
        memory: memory of each candidate; None if it was not asked for or the system does not report it.
    """

    timings: tuple[DecodeTiming, ...]
    noise: tuple[tuple[float, float], ...]
    memory: tuple[Memory | None, ...]
    num_prompt: int
    num_new: int
    versions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for timing, of in zip(found["timings"], self.timings, strict=True):
            timing["candidate"] = of.candidate.to_dict()
        return found


def decode(
    candidates: Sequence[Candidate],
    num_prompt: int = 64,
    num_new: int = 64,
    timing: Timing = Timing(),
    seed: int = 0,
    events: Events = Events(),
) -> DecodeBench:
    """Time the candidates in turn, at batch 1.

    Args:
        num_prompt: tokens that are read first.
        num_new: tokens that are then read one by one; fewer where no seconds are given and a minute is too short.

    Raises InputError for a model that is no language model, or a runtime that does not run these token by token;
    ModelError for a file without a cache; MissingExtra for a runtime that is not installed.
    """
    if min(num_prompt, num_new) < 1:
        raise InputError(f"--prompt {num_prompt} and --new-tokens {num_new}: both are numbers of tokens, 1 or more")
    factory = next((candidate for candidate in candidates if candidate.weights is not None), None)
    if factory is not None:
        raise InputError(f"{factory.model}: --weights goes with a factory; decoding takes folders and files")
    ids = np.random.default_rng(seed).integers(1, NUM_TOKENS, (1, num_prompt + num_new))
    timings: list[DecodeTiming] = []
    noises: list[tuple[float, float]] = []
    num_counts, seconds = len(timing.threads), timing.seconds
    limit = TimeLimit(None if seconds is None else seconds * len(candidates) * num_counts)
    whole = num_counts + timing.memory * len(candidates)
    for done, num_threads in enumerate(timing.threads):
        events.on_progress("timing", done, whole)
        decoders = [open_decoder(c.model, c.runtime, num_threads=num_threads, dtype=c.dtype) for c in candidates]
        usual, most = limit.share(num_counts - done, USUAL * len(decoders))
        with threads(num_threads), limit.counting():
            found = measure_decoding(
                [*decoders, decoders[0]],
                ids,
                num_prompt,
                seconds=usual,
                most_seconds=most if seconds is None else math.inf,
                seed=seed,
                clock=timing.clock,
            )
        *prompts, _ = found.prompts
        *tokens, again = found.tokens
        noises.append(again.speedup_interval)
        for candidate, prompt, token in zip(candidates, prompts, tokens, strict=True):
            speed = token.tokens_per_second or 0.0
            timings.append(DecodeTiming(candidate, prompt, token, speed, token.difference(again.speedup_interval)))
        del decoders
    opened: list[Memory | None] = []
    for done, candidate in enumerate(candidates, start=num_counts):
        events.on_progress("timing", min(done, whole), whole)
        opened.append(memory_of(candidate, {"input_ids": ids}, timing, decode=True))
    events.on_progress("timing", whole, whole)
    versions = dict.fromkeys(runtime_for(c.model, c.runtime).version() for c in candidates)
    return DecodeBench(tuple(timings), tuple(noises), tuple(opened), num_prompt, found.num_new, tuple(versions))
