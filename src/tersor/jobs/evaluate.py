"""The job of `tersor evaluate`: the scorecard of one model."""

from dataclasses import dataclass

from tersor.checkpoint.open import ModelSpec
from tersor.core.progress import Events
from tersor.jobs.compare import compare
from tersor.jobs.settings import Timing
from tersor.kernels.choice import KernelTiming
from tersor.measure.scorecard import Scorecard
from tersor.tasks.data import Data


@dataclass(frozen=True)
class Evaluated:
    """The scorecard of a model, what it was measured on, with which kernels, and what the user should know."""

    scorecard: Scorecard
    task: str
    kernels: list[KernelTiming]
    notes: list[str]


def evaluate(model: ModelSpec, data: Data = Data(), timing: Timing = Timing(), events: Events = Events()) -> Evaluated:
    """Measure bytes, memory, operations, latency and the score of a model. Raises a TersorError with the way out."""
    found = compare([model], data, timing=timing, events=events)
    notes = list(found.scorecards[0].untimed)
    if data.task in (None, "fidelity"):
        notes.append(
            f"fidelity compares a model with the original, and here with itself, so its score says nothing; "
            f"tersor compare ORIGINAL {model.name} judges it"
        )
        events.on_note(notes[-1])
    return Evaluated(found.scorecards[0], found.task, found.kernels, notes)
