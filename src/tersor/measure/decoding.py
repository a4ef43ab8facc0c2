"""Speed of reading a prompt and generating text: seconds per token of several decoders, in turn, on the same tokens.

All tokens are made up beforehand, the same for all models; choosing the next token is not timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from tersor.measure.latency import Latency, measure_calls, now
from tersor.runtimes import Decoder

THREE = 3  # rounds: the first call of each decoder, and two that count


@dataclass(frozen=True)
class Decoding:
    """The times of each decoder.

    Attributes:
        prompts: reading the prompt at once.
        tokens: one new token; the mean over those of a round.
        num_new: new tokens of a round: as many as were asked for, or as there was time for.
    """

    prompts: list[Latency]
    tokens: list[Latency]
    num_new: int


def measure_decoding(
    decoders: Sequence[Decoder],
    ids: Int64[np.ndarray, "row token"],
    num_prompt: int,
    *,
    seconds: float,
    most_seconds: float,
    seed: int = 0,
    clock: Callable[[], float] = now,
) -> Decoding:
    """Time decoders in turn: in a round each reads the prompt, the first `num_prompt` of the tokens, and then the rest
    one by one, on the threads that are set. Where there is no time for three such rounds, fewer are read one by one.

    Args:
        seconds: about how long both measurements take together, unless that is too short for a few rounds.
        most_seconds: limit on their time in that case.
        clock: function that returns the time in seconds.
    """
    batch_size, num_new = len(ids), ids.shape[1] - num_prompt
    prompt = ids[:, :num_prompt]
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "num_threads": torch.get_num_threads(),
        "seed": seed,
        "clock": clock,
    }
    time_calls: Any = partial(measure_calls, **common)
    started = now()
    prompts = time_calls(
        [partial(decoder.feed, prompt) for decoder in decoders],
        before=[decoder.reset for decoder in decoders],
        seconds=seconds / 5,
        most_seconds=most_seconds / 5,
    )
    began = now()
    for decoder in decoders:
        begin(decoder, prompt)
        one_by_one(decoder, ids[:, num_prompt : num_prompt + 1])
    read = sum(each.p50 for each in prompts) / 1e3
    written = max(1e-9, now() - began - read)  # one token of each
    spent = now() - started
    num_new = int(min(num_new, max(1, ((most_seconds - spent) / THREE - read) / written)))
    needed = THREE * (read + num_new * written)
    new = ids[:, num_prompt : num_prompt + num_new]
    tokens = time_calls(
        [partial(one_by_one, decoder, new) for decoder in decoders],
        before=[partial(begin, decoder, prompt) for decoder in decoders],
        seconds=max(seconds - spent, needed),
        most_seconds=most_seconds - spent,
    )
    return Decoding(
        [named(each, "prompt", 1, batch_size * num_prompt) for each in prompts],
        [named(each, "token", num_new, batch_size) for each in tokens],
        num_new,
    )


def named(latency: Latency, work: str, num_calls: int, num_tokens: int) -> Latency:
    """A timing of `num_calls` calls as that of one call, which reads `num_tokens` tokens."""
    p50, p95 = latency.p50 / num_calls, latency.p95 / num_calls
    return replace(latency, p50=p50, p95=p95, work=work, tokens_per_second=1e3 * num_tokens / p50)


def begin(decoder: Decoder, prompt: Int64[np.ndarray, "row token"]) -> None:
    """Reset the decoder and feed it the prompt."""
    decoder.reset()
    decoder.feed(prompt)


def one_by_one(decoder: Decoder, ids: Int64[np.ndarray, "row token"]) -> None:
    """Read tokens, one of each row in a call."""
    for position in range(ids.shape[1]):
        decoder.feed(ids[:, position : position + 1])
