"""The scorecard: what was measured of one model, and how the models of a comparison were measured together."""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tersor.core.processor import instruction_sets, processor
from tersor.core.progress import Progress, silent
from tersor.core.threads import threads
from tersor.measure.decoding import measure_decoding
from tersor.measure.latency import Latency, TimeLimit, expected, measure_latency
from tersor.measure.memory import measure_peak_memory
from tersor.measure.size import measure_size
from tersor.measure.verdict import interval
from tersor.nn.macs import count_macs
from tersor.runtimes.feeds import NUM_TOKENS
from tersor.runtimes.torch_decoder import TorchDecoder
from tersor.tasks.contract import Task
from tersor.tasks.inputs import Batch
from tersor.tasks.scores import Scores

BATCH_SIZES = (1, 32)
PROMPT, NEW = 64, 16  # tokens that a language model reads, and writes, in a round


@dataclass(frozen=True)
class Subject:
    """A model to measure, and the bytes of its files."""

    name: str
    model: nn.Module
    file_bytes: int
    folder_bytes: int | None = None


@dataclass(frozen=True)
class Scorecard:
    """Everything measured of one model.

    Attributes:
        file_bytes: bytes of the weights on disk; folder_bytes: of the whole folder, tokenizer and config included.
        memory_bytes: bytes of all tensors as they lie in memory.
        macs: multiply-accumulates per example of the first evaluation batch.
        peak_memory: memory_bytes plus the most that one forward pass at the largest timed batch added, or a language
            model's reading of the prompt.
        latency: per batch size, of a language model the prompt and a new token each; `speedup` is against the first
            model of the comparison.
        score_interval: 95 %.
        untimed: a sentence for each batch size that there was no time for.
    """

    name: str
    file_bytes: int
    folder_bytes: int | None
    memory_bytes: int
    num_parameters: int
    num_nonzeros: int
    macs: int
    peak_memory: int | None
    latency: list[Latency]
    metric: str
    score: float
    score_interval: tuple[float, float]
    num_examples: int
    extras: dict[str, float] = field(default_factory=dict)
    untimed: tuple[str, ...] = ()

    @property
    def bits_per_parameter(self) -> float:
        """The whole file over all parameters."""
        return 8 * self.file_bytes / max(1, self.num_parameters)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bits_per_parameter": self.bits_per_parameter}


def measure(
    subjects: Sequence[Subject],
    scores: Sequence[Scores],
    task: Task,
    *,
    batch_sizes: Sequence[int] | None = None,
    num_threads: int = 1,
    limit: TimeLimit | None = None,
    progress: Progress = silent,
) -> list[Scorecard]:
    """Scorecards of models that were scored on `task`; latency is measured in turn, on the same inputs.

    Latency is taken on one thread unless told otherwise: on a shared machine several threads wait for each other, and
    the ratio measures the neighbours.

    Args:
        batch_sizes: None is 1 and 32, and 1 alone for language models.
        limit: time that timing may take; None is a minute.
    """
    limit = limit or TimeLimit()
    models = [subject.model for subject in subjects]
    timing = time_writing if all(writes(model) for model in models) else partial(time_passes, task)
    latencies, run, untimed = timing(models, batch_sizes, num_threads, limit, progress)
    one = next(iter(task.batches("eval", batch_size=1)))
    cards = []
    for subject, score, latency_list in zip(subjects, scores, latencies, strict=True):
        size = measure_size(subject.model)
        cards.append(
            Scorecard(
                name=subject.name,
                file_bytes=subject.file_bytes,
                folder_bytes=subject.folder_bytes,
                memory_bytes=size.num_bytes,
                num_parameters=size.num_parameters,
                num_nonzeros=size.num_nonzeros,
                macs=count_macs(subject.model, partial(forward, task, one)),
                peak_memory=measure_peak_memory(subject.model, run, size.num_bytes),
                latency=latency_list,
                metric=score.metric.name,
                score=score.value,
                score_interval=interval(score),
                num_examples=score.num_examples,
                extras=score.extras,
                untimed=untimed,
            )
        )
    return cards


Timed = tuple[list[list[Latency]], Callable[[nn.Module], object], tuple[str, ...]]


def time_passes(
    task: Task,
    models: Sequence[nn.Module],
    batch_sizes: Sequence[int] | None,
    num_threads: int,
    limit: TimeLimit,
    progress: Progress,
) -> Timed:
    """Time passes over batches of the task, the smallest first; larger ones that there is no time for are left out.

    Returns the latencies of each model, the pass over the largest batch that was timed, and a sentence for each that
    was not.
    """
    sizes, untimed = sorted(set(batch_sizes or BATCH_SIZES)), []
    rounds: dict[int, list[Latency]] = {}  # few examples give smaller batches than were asked for
    run = None
    for done, size in enumerate(sizes):
        progress("timing", done, len(sizes))
        batch = next(iter(task.batches("eval", batch_size=size)))
        size = len(batch.rows) if isinstance(batch, Batch) else size
        needed = expected(rounds[max(rounds)], size, num_calls=4) if rounds else 0.0  # two to time, two for memory
        if refusal := limit.refusal(f"batch {size}", needed):
            untimed.append(f"{refusal}; --timing-seconds {math.ceil(needed)} times it")
            continue
        with limit.counting():
            with torch.inference_mode():
                size = len(task.forward(models[0], batch))
            if size not in rounds:
                run = partial(forward, task, batch)
                usual, most = limit.share(len(sizes) - done)
                rounds[size] = measure_latency(
                    models, run, batch_size=size, num_threads=num_threads, seconds=usual, most_seconds=most
                )
    progress("timing", len(sizes), len(sizes))
    assert run is not None
    return [list(each) for each in zip(*rounds.values(), strict=True)], run, tuple(untimed)


def time_writing(
    models: Sequence[nn.Module],
    batch_sizes: Sequence[int] | None,
    num_threads: int,
    limit: TimeLimit,
    progress: Progress,
) -> Timed:
    """Time language models that read a prompt and write; arguments and result are those of `time_passes`."""
    decoders = [TorchDecoder(model, type(model).__name__, num_threads) for model in models]
    sizes, untimed = sorted(set(batch_sizes or (1,))), []
    found: list[list[Latency]] = [[] for _ in models]
    run = None
    for done, size in enumerate(sizes):
        progress("timing", done, len(sizes))
        needed = expected([each[-2] for each in found if each], size, num_calls=6)  # the prompts alone
        if refusal := limit.refusal(f"batch {size}", needed):
            untimed.append(f"{refusal}; --timing-seconds {math.ceil(needed)} times it")
            continue
        ids = tokens_for(models[0], size)
        num_prompt = ids.shape[1] * PROMPT // (PROMPT + NEW)
        usual, most = limit.share(len(sizes) - done)
        with threads(num_threads), limit.counting():
            timed = measure_decoding(decoders, ids, num_prompt, seconds=usual, most_seconds=most)
        run = partial(read_at_once, ids[:, :num_prompt])
        for kept, prompt, token in zip(found, timed.prompts, timed.tokens, strict=True):
            kept += [prompt, token]
    progress("timing", len(sizes), len(sizes))
    assert run is not None
    return found, run, tuple(untimed)


def writes(model: nn.Module) -> bool:
    """True for a language model that reads token by token, with a cache."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return False
    try:
        read_at_once(tokens_for(model, 1)[:, :1], model)
    except Exception:  # a model with a cache of its own kind, or none: it is timed by passes
        return False
    return True


def read_at_once(ids: np.ndarray, model: nn.Module) -> object:
    """Feed tokens to a new decoder of a model."""
    return TorchDecoder(model, type(model).__name__, torch.get_num_threads()).feed(ids)


def tokens_for(model: nn.Module, batch_size: int) -> np.ndarray:
    """Made-up tokens `[batch, PROMPT + NEW]`, fewer where the model has no places for so many."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    places = getattr(config, "max_position_embeddings", None) or PROMPT + NEW
    length = max(2, min(PROMPT + NEW, places))
    return np.random.default_rng(0).integers(1, min(NUM_TOKENS, config.vocab_size), (batch_size, length))


def forward(task: Task, batch: Any, model: nn.Module) -> object:
    """`task.forward` with the model last, so that the rest can be bound."""
    return task.forward(model, batch)


def machine() -> dict[str, Any]:
    """Versions of the libraries and a description of the hardware, for reports."""
    return {
        "tersor": version("tersor"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "processor": processor(),
        "instruction_sets": list(instruction_sets()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
