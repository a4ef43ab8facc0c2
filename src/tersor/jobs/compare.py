"""The job of `tersor compare`: models measured on the same examples, in turn, and judged against the first."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.open import ModelSpec
from tersor.core.progress import Events
from tersor.jobs.compress import DEFAULT_DROP
from tersor.jobs.settings import Timing
from tersor.kernels import choices
from tersor.kernels.choice import KernelTiming
from tersor.measure.latency import TimeLimit
from tersor.measure.scorecard import Scorecard, Subject, measure
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.tasks.data import Data
from tersor.tasks.progress import score


@dataclass(frozen=True)
class Compared:
    """Scorecards of several models, and their verdicts.

    Attributes:
        scorecards: one for each model.
        verdicts: verdicts of every model but the first, against the first.
        task: the task and its data, in words.
        kernels: the kernels that multiplied packed weights, in words.
    """

    scorecards: list[Scorecard]
    verdicts: list[Verdict]
    task: str
    kernels: list[KernelTiming]


def compare(
    models: Sequence[ModelSpec],
    data: Data = Data(),
    drop: str = DEFAULT_DROP,
    seed: int = 0,
    timing: Timing = Timing(),
    events: Events = Events(),
) -> Compared:
    """Measure all models together, and judge each against the first, which may be better by `drop`.

    Raises a TersorError with the way out.
    """
    began = time.perf_counter()
    tolerance = Tolerance.parse(drop)
    torch.manual_seed(seed)
    sources = [model.open_to_run() for model in models]
    for note in dict.fromkeys(note for source in sources if source.dtypes for note in source.notes[-1:]):
        events.on_note(note)
    task = data.open(sources[0])
    task.prepare(sources[0].model)
    scores = [score(task, source.model, events.on_progress, f"evaluating {source.name}") for source in sources]
    subjects = [Subject(s.name, s.model, s.num_bytes or size_of(s.model)) for s in sources]
    limit = TimeLimit(timing.timing_seconds, time.perf_counter() - began)
    cards = measure(
        subjects,
        scores,
        task,
        batch_sizes=timing.batch_sizes,
        num_threads=timing.threads[0],
        limit=limit,
        progress=events.on_progress,
    )
    for note in cards[0].untimed:
        events.on_note(note)
    verdicts = [judge(scores[0], other, tolerance, seed=seed) for other in scores[1:]]
    return Compared(cards, verdicts, task.description, choices())
