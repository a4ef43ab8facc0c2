"""The contract of a runner, which turns the specs of trials into results; both are pure data."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from tersor.calibration.curvature import estimate_fisher
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.open import ModelSpec
from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.methods.stats import Stats
from tersor.pipeline import Compressed, run
from tersor.recipe import Recipe
from tersor.tasks.contract import Task
from tersor.tasks.data import Data
from tersor.tasks.progress import score
from tersor.tasks.scores import Scores


@dataclass(frozen=True)
class TrialSpec:
    """One trial: names, paths, a recipe and numbers, from which any process makes the same model and the same scores.

    Attributes:
        model: the name of the original, and how it is opened.
        data: how the task is opened.
        recipe: the steps done to the original.
        seed: seed of everything random that the recipe does not seed itself.
        curvature: True if the curvature of the loss is measured first, for the methods that weigh by it.
    """

    model: ModelSpec
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=Recipe.of)
    seed: int = 0
    curvature: bool = True

    @property
    def bench(self) -> "TrialSpec":
        """The workbench that it shares with other trials of the same original and data."""
        return replace(self, recipe=Recipe.of())

    def check_portable(self) -> None:
        """Raises InputError for a model or a task that is in the memory of this process alone."""
        for what, given in (("model", self.model.model), ("task", self.data.task)):
            if isinstance(given, nn.Module) or not (given is None or isinstance(given, str) or what == "model"):
                raise InputError(
                    f"the {what} is in memory ({type(given).__name__}), and other processes cannot open it: give a "
                    f"folder or package.module:factory"
                )


@dataclass(frozen=True)
class TrialResult:
    """The result of one trial.

    Attributes:
        recipe: the steps that were done, with every method by name.
        num_bytes: bytes of the weights file.
        scores: scores of the examples of the evaluation split.
        losses: losses of the trainings, by name of the step: the last tenth of their steps, on average.
    """

    spec: TrialSpec
    recipe: Recipe
    num_bytes: int
    scores: Scores
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workbench:
    """The original and its data, opened once for all trials of them."""

    model: nn.Module
    task: Task
    stats: Mapping[str, Stats] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: TrialSpec, events: Events = Events()) -> "Workbench":
        """Open what a spec names. Raises a TersorError with the way out."""
        torch.manual_seed(spec.seed)
        source = spec.model.open_to_run()
        task = spec.data.open(source)
        task.prepare(source.model)
        progress = events.on_progress
        stats = estimate_fisher(source.model, task, seed=spec.seed, progress=progress) if spec.curvature else {}
        return cls(source.model, task, stats)

    def trial(self, spec: TrialSpec, what: str, events: Events = Events()) -> tuple[TrialResult, Compressed]:
        """Make the model of a spec, and measure it; `what` is shown while it is scored."""
        torch.manual_seed(spec.seed)
        made = run(spec.recipe, self.model, self.task, stats=self.stats, events=events)
        scores = score(self.task, made.model, events.on_progress, what)
        losses = {}
        for curve in made.curves:
            last = curve.losses[-max(1, len(curve.losses) // 10) :]
            losses[curve.name] = sum(last) / max(1, len(last))
        return TrialResult(spec, made.recipe, size_of(made.model), scores, losses), made


class Runner(Protocol):
    """The contract of a runner of trials."""

    def run(self, specs: Iterable[TrialSpec], what: str = "evaluating a trial") -> Iterator[TrialResult]:
        """The results, in the order of the specs, each as soon as it is there. Raises what a trial raises."""

    def model_of(self, spec: TrialSpec) -> Compressed | None:
        """The model of a trial, where it still is in the memory of this process."""
