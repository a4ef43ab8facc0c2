"""Trials of a search: kept as they finish, taken up again, and never for other inputs."""

import json

import numpy as np
import pytest
from torch import nn

from tersor.checkpoint.open import ModelSpec
from tersor.measure.verdict import Tolerance
from tersor.recipe import Recipe
from tersor.search.runners.contract import TrialSpec, Workbench
from tersor.search.runners.serial import SerialRunner
from tersor.search.trials import TrialJournal, Trials, smallest_within
from tersor.tasks.data import Data
from tersor.tasks.scores import METRICS, Scores

ROWS = np.random.default_rng(0).normal(2, 0.3, (40, 1))
ORIGINAL = Scores(METRICS["mean"], ROWS)


class Worse:
    """A task that scores a model by how coarse its format is."""

    name = description = fingerprint = "worse"

    def batches(self, split, batch_size=None):
        return iter([0])

    def score(self, model, split):
        bits = int(model[0].packed.format.name[3])
        return Scores(METRICS["mean"], ROWS - 0.5**bits + 0.001 * np.arange(40)[:, None] / 40)


class Noting(SerialRunner):
    """Notes what is made."""

    def __init__(self, spec, made):
        super().__init__([(spec, Workbench(spec.model.model, spec.data.task))])
        self.made = made

    def run(self, specs, what=""):
        specs = list(specs)
        self.made += [spec.recipe.weights[0].scheme for spec in specs]
        return super().run(specs, what)


def search(path, made, on_trial=lambda trial: None, inputs=("same",)):
    spec = TrialSpec(ModelSpec(nn.Sequential(nn.Linear(64, 64))), Data(Worse()))
    journal = TrialJournal(path, inputs)
    trials = Trials(spec, Noting(spec, made), ORIGINAL, Tolerance.parse("5%"), on_trial, journal)
    for format in ("nearest:int8", "nearest:int2", "nearest:int4", "nearest:int3"):
        trials.run(Recipe.of(format))
    return trials


def test_a_search_that_was_stopped_goes_on_with_the_same_result(tmp_path):
    path, made = tmp_path / ".out.trials", []
    whole = search(tmp_path / "other", [])

    def stop(trial):
        if len(made) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(path, made, stop)
    assert made == ["nearest:int8", "nearest:int2"]
    made.clear()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"recipe": "half a li')  # as a killed run leaves it
    again = search(path, made)
    assert made == ["nearest:int4", "nearest:int3"], "what had finished is not made again"
    assert again.finished == whole.finished
    assert smallest_within(again.finished).recipe == smallest_within(whole.finished).recipe == Recipe.of("nearest:int4")
    assert again.best.recipe == Recipe.of("nearest:int4")


def test_trials_of_other_inputs_are_not_taken(tmp_path):
    path, made = tmp_path / "trials", []
    search(path, made)
    search(path, made, inputs=("same", "and more"))
    assert len(made) == 8
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


@pytest.mark.parametrize("text", ["", "not json\n", "[]\n{}\n", json.dumps({"inputs": "other"}) + "\n"])
def test_a_damaged_journal_is_begun_anew(tmp_path, text):
    path, made = tmp_path / "trials", []
    path.write_text(text, encoding="utf-8")
    search(path, made)
    assert len(made) == 4


def test_where_it_was_stopped_it_says_what_it_found_and_how_to_go_on(tmp_path):
    trials = search(tmp_path / ".out.trials", [])
    said = trials.way_on()
    assert "4 trials had finished" in said
    assert said.count("5%: mean ") == 4
    assert "the same command goes on from there" in said
    assert ".out.trials" in said
