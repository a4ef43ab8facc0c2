"""The scorecard: what was measured of one model, and how the models of a comparison were measured together."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy
import torch
import transformers
from torch import nn

from tersor.core.progress import Progress, silent
from tersor.measure.latency import Latency, measure_latency
from tersor.measure.memory import measure_peak_memory
from tersor.measure.size import measure_size
from tersor.measure.verdict import interval
from tersor.nn.macs import count_macs
from tersor.tasks.contract import Task
from tersor.tasks.scores import Scores


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
        file_bytes: of the weights on disk; folder_bytes: of the whole folder, tokenizer and config included.
        memory_bytes: of all tensors as they lie in memory.
        macs: multiply-accumulates per example of the first evaluation batch.
        peak_memory: memory_bytes plus the most one forward pass at the largest measured batch added.
        latency: per batch size; `speedup` is against the first model of the comparison.
        score_interval: 95 %.
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
    batch_sizes: Sequence[int] = (1, 32),
    num_threads: int = 1,
    progress: Progress = silent,
) -> list[Scorecard]:
    """Scorecards of models that were scored on `task`; latency is measured in turn, on the same batches.

    Latency is taken on one thread unless told otherwise: on a shared machine several threads wait for each other, and
    the ratio measures the neighbours.
    """
    asked = [next(iter(task.batches("eval", batch_size=size))) for size in batch_sizes]
    with torch.inference_mode():  # few examples give smaller batches than were asked for
        batches = {len(task.forward(subjects[0].model, batch)): batch for batch in asked}
    one = next(iter(task.batches("eval", batch_size=1)))
    models = [subject.model for subject in subjects]
    latencies: list[list[Latency]] = [[] for _ in subjects]
    for done, (batch_size, batch) in enumerate(batches.items()):
        progress("timing", done, len(batches))
        found = measure_latency(models, partial(forward, task, batch), batch_size=batch_size, num_threads=num_threads)
        for latency, kept in zip(found, latencies, strict=True):
            kept.append(latency)
    progress("timing", len(batches), len(batches))
    cards = []
    for subject, score, latency_list in zip(subjects, scores, latencies, strict=True):
        size = measure_size(subject.model)
        peak = measure_peak_memory(subject.model, partial(forward, task, batches[max(batches)]), size.num_bytes)
        cards.append(
            Scorecard(
                name=subject.name,
                file_bytes=subject.file_bytes,
                folder_bytes=subject.folder_bytes,
                memory_bytes=size.num_bytes,
                num_parameters=size.num_parameters,
                num_nonzeros=size.num_nonzeros,
                macs=count_macs(subject.model, partial(forward, task, one)),
                peak_memory=peak,
                latency=latency_list,
                metric=score.metric.name,
                score=score.value,
                score_interval=interval(score),
                num_examples=score.num_examples,
                extras=score.extras,
            )
        )
    return cards


def forward(task: Task, batch: Any, model: nn.Module) -> object:
    """`task.forward` with the model last, so that the rest can be bound."""
    return task.forward(model, batch)


def machine() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    return {
        "tersor": version("tersor"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
