"""Language models that write, each in its own runtime: tokens per second at batch 1, in turn, on the same tokens.

A round of a model reads the prompt, which is timed apart, then token after token. What is fed is made up beforehand,
for all models alike; choosing the next token is no part of it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tersor.core.errors import InputError
from tersor.core.progress import Progress, silent
from tersor.core.threads import threads
from tersor.jobs.bench import Candidate
from tersor.measure.latency import Latency, measure_calls
from tersor.measure.memory import Memory, measure_opened
from tersor.runtimes import Decoder, open_decoder, runtime_for
from tersor.runtimes.feeds import NUM_TOKENS


@dataclass(frozen=True)
class DecodeTiming:
    """One candidate at one number of threads.

    Attributes:
        prompt: reading the prompt at once.
        token: one new token; the mean over those of a round.
        tokens_per_second: of the median round.
        difference: of the new tokens, from the first candidate.
    """

    candidate: Candidate
    prompt: Latency
    token: Latency
    tokens_per_second: float
    difference: str


@dataclass(frozen=True)
class DecodeBench:
    """What was measured.

    Attributes:
        timings: the candidates in their order, within thread counts.
        noise: 95 % interval of the first against itself, for each thread count.
        memory: of each candidate; None where it was not asked for or the kernel does not tell.
    """

    timings: tuple[DecodeTiming, ...]
    noise: tuple[tuple[float, float], ...]
    memory: tuple[Memory | None, ...]
    num_prompt: int
    num_new: int
    versions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for timing in found["timings"]:
            timing["candidate"].pop("weights")
        return found


def decode_bench(
    candidates: Sequence[Candidate],
    *,
    num_prompt: int = 64,
    num_new: int = 64,
    thread_counts: Sequence[int] = (1,),
    seconds: float = 4.0,
    memory: bool = True,
    cpu_time: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> DecodeBench:
    """Time the candidates in turn; the arguments are those of `bench`.

    Args:
        num_prompt: tokens that are read first.
        num_new: tokens that are then read one by one.

    Raises InputError for a model that is no language model, or a runtime that does not run these token by token;
    ModelError for a file without a cache; MissingExtra for a runtime that is not installed.
    """
    if min(num_prompt, num_new) < 1:
        raise InputError(f"--prompt {num_prompt} and --new-tokens {num_new}: both are numbers of tokens, 1 or more")
    if cpu_time and max(thread_counts) > 1:
        raise InputError("--cpu-time adds up all threads, so it says nothing of several; use it with --threads 1")
    factory = next((candidate for candidate in candidates if candidate.weights is not None), None)
    if factory is not None:
        raise InputError(f"{factory.model}: --weights goes with a factory; decoding takes folders and files")
    ids = np.random.default_rng(seed).integers(1, NUM_TOKENS, (1, num_prompt + num_new))
    prompt, new = ids[:, :num_prompt], ids[:, num_prompt:]
    clock = time.process_time if cpu_time else time.perf_counter
    timings: list[DecodeTiming] = []
    noises: list[tuple[float, float]] = []
    done, whole = 0, 2 * len(thread_counts) + memory * len(candidates)
    for num_threads in thread_counts:
        decoders = [open_decoder(c.model, c.runtime, num_threads=num_threads) for c in candidates]
        asked: dict[str, Any] = {"batch_size": 1, "num_threads": num_threads, "seed": seed, "clock": clock}
        each = [*decoders, decoders[0]]
        with threads(num_threads):
            progress("timing", done, whole)
            *prompts, _ = measure_calls(
                [partial(decoder.feed, prompt) for decoder in each],
                before=[decoder.reset for decoder in each],
                seconds=seconds * len(decoders) / 4,
                **asked,
            )
            progress("timing", done + 1, whole)
            *tokens, again = measure_calls(
                [partial(one_by_one, decoder, new) for decoder in each],
                before=[partial(begin, decoder, prompt) for decoder in each],
                seconds=seconds * len(decoders),
                **asked,
            )
        done += 2
        noise = again.speedup_interval
        noises.append(noise)
        for candidate, first, rest in zip(candidates, prompts, tokens, strict=True):
            token = replace(rest, p50=rest.p50 / num_new, p95=rest.p95 / num_new)
            timings.append(DecodeTiming(candidate, first, token, 1e3 / token.p50, token.difference(noise)))
        del decoders, each
    opened: list[Memory | None] = []
    for candidate in candidates:
        progress("timing", done, whole)
        feeds = {"input_ids": ids}
        count = thread_counts[0]
        opened.append(
            measure_opened(candidate.model, candidate.runtime, feeds, num_threads=count, decode=True)
            if memory
            else None
        )
        done += memory
    progress("timing", whole, whole)
    versions = dict.fromkeys(runtime_for(c.model, c.runtime).version() for c in candidates)
    return DecodeBench(tuple(timings), tuple(noises), tuple(opened), num_prompt, num_new, tuple(versions))


def begin(decoder: Decoder, prompt: np.ndarray) -> None:
    """Forget all, and read the prompt."""
    decoder.reset()
    decoder.feed(prompt)


def one_by_one(decoder: Decoder, ids: np.ndarray) -> None:
    """Read tokens `[1, token]`, each in a call of its own."""
    for position in range(ids.shape[1]):
        decoder.feed(ids[:, position : position + 1])
