"""Trials of a search: judged, reported and saved to disk as each finishes, so that a stopped search can go on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import InputError
from tersor.core.progress import silent
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.pipeline import Compressed
from tersor.recipe import Recipe
from tersor.search.runners.contract import Runner, TrialResult, TrialSpec
from tersor.tasks.scores import Scores

NUM_TRIALS = 7
ALPHA = 0.05


@dataclass(frozen=True)
class Trial:
    """One measured point of the frontier; `scores` are those of its examples."""

    num_bytes: int
    score: float
    verdict: Verdict
    recipe: Recipe
    scores: Scores | None = field(default=None, repr=False, compare=False)


def smallest_within(trials: Iterable[Trial]) -> Trial | None:
    """The smallest trial whose verdict is `within`; None when there is none."""
    return min((t for t in trials if t.verdict.outcome == "within"), key=lambda t: t.num_bytes, default=None)


def nearest_points(trials: Iterable[Trial]) -> str:
    """The trials with the least drop, for the message of an infeasible search."""
    closest = sorted(trials, key=lambda t: t.verdict.drop)[:3]
    return "; ".join(f"{t.num_bytes:,} bytes: {t.verdict.sentence()}" for t in closest)


class TrialJournal:
    """The finished trials of one search in a file that is only appended to, one JSON object a line.

    What was kept for other inputs is thrown away; a line that a killed run left half written is skipped.

    Args:
        path: path of the file; None: nothing is saved.
        inputs: all that the trials depend on.
    """

    def __init__(self, path: Path | None = None, inputs: Iterable[str] = ()):
        self.path = path
        self.known: dict[str, dict] = {}
        key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
        if path is None:
            return
        lines = list(read_lines(path))
        if lines and lines[0].get("inputs") == key:
            self.known = {line["recipe"]: line for line in lines[1:] if {"recipe", "bytes", "rows"} <= line.keys()}
        else:
            self.append({"inputs": key}, mode="w")

    def find(self, recipe: Recipe, original: Scores) -> tuple[int, Scores] | None:
        """Bytes and scores of a trial that finished before."""
        line = self.known.get(recipe.to_yaml())
        if line is None:
            return None
        rows = np.array(line["rows"], dtype=float).reshape(-1, original.examples.shape[1])
        return line["bytes"], replace(original, examples=rows, extras=line["extras"])

    def add(self, recipe: Recipe, num_bytes: int, scores: Scores) -> None:
        rows = np.asarray(scores.examples, dtype=float).tolist()
        line = {"recipe": recipe.to_yaml(), "bytes": num_bytes, "rows": rows, "extras": scores.extras}
        self.known[line["recipe"]] = line
        self.append(line)

    def append(self, line: dict, mode: str = "a") -> None:
        """One line, on disk when this returns. Raises InputError where it cannot be written."""
        if self.path is None:
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path}: trials cannot be saved here: {error.strerror}") from None

    def remove(self) -> None:
        """The search has ended well."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterable[dict]:
    """The whole lines of a journal."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


@dataclass
class Trials:
    """The trials of one search in their order, each judged at its share of the error that is allowed.

    Attributes:
        spec: the spec of all trials, whose recipe is replaced.
        runner: runs them.
        original: scores of the model that they are made from.
        best: the model of the smallest trial that is within, where it was made in this run and process.
    """

    spec: TrialSpec
    runner: Runner
    original: Scores
    tolerance: Tolerance
    on_trial: Callable[[Trial], None] = silent
    journal: TrialJournal = field(default_factory=TrialJournal)
    finished: list[Trial] = field(default_factory=list)
    best: Compressed | None = None

    def run(self, recipe: Recipe, num_trials: int = NUM_TRIALS) -> Trial:
        """Make a model and judge it, or reuse the saved result of the same trial."""
        spec = replace(self.spec, recipe=recipe)
        known = self.journal.find(recipe, self.original)
        if known is None:
            what = f"evaluating trial {len(self.finished) + 1} of at most {num_trials}"
            (result,) = self.runner.run([spec], what)
            self.journal.add(recipe, result.num_bytes, result.scores)
        else:
            result = TrialResult(spec, recipe, *known)
        trial = self.judged(result, num_trials)
        if smallest_within(self.finished) is trial:
            self.best = self.runner.model_of(spec)
        self.on_trial(trial)
        return trial

    def run_all(self, recipes: Sequence[Recipe]) -> list[Trial]:
        """Make the models of several recipes, as many at once as the runner runs, and judge each."""
        specs = [replace(self.spec, recipe=recipe) for recipe in recipes]
        trials = []
        for result in self.runner.run(specs):
            trials.append(self.judged(result, len(recipes)))
            self.on_trial(trials[-1])
        return trials

    def judged(self, result: TrialResult, num_trials: int) -> Trial:
        """A result with its verdict, which is one of `num_trials`; it is finished by that."""
        alpha = ALPHA / num_trials
        verdict = judge(self.original, result.scores, self.tolerance, alpha=alpha, seed=self.spec.seed)
        trial = Trial(result.num_bytes, result.scores.value, verdict, result.recipe, result.scores)
        self.finished.append(trial)
        return trial

    def way_on(self) -> str:
        """The trials that have finished, and how to continue a search that was stopped."""
        done = "; ".join(f"{t.num_bytes:,} bytes: {t.verdict.sentence()}" for t in self.finished)
        there = (
            f"; the same command goes on from there, with what is in {self.journal.path}" if self.journal.path else ""
        )
        return f"{len(self.finished)} trials had finished ({done}){there}"


def recipes_over(recipe: Recipe, number: int, name: str, values: Iterable[Any]) -> list[Recipe]:
    """The same recipe with one field of one step at several values: a student's `width`, a lottery's `sparsity`.

    >>> recipe = Recipe.from_yaml("steps: [{step: prune, sparsity: 0.5}, {scheme: int8}]")
    >>> [each.steps[0].sparsity for each in recipes_over(recipe, 0, "sparsity", [0.5, 0.9])]
    [0.5, 0.9]
    """
    data = recipe.model_dump(mode="json")
    made = []
    for value in values:
        steps = [dict(step) for step in data["steps"]]
        steps[number][name] = value
        made.append(Recipe.validated({**data, "steps": steps}, f"step {number}, {name} {value}"))
    return made
