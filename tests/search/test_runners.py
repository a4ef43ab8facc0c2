"""Trials are pure data: another process makes the same of them, whatever kind of search they belong to."""

import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

import tersor
from tersor.checkpoint.open import ModelSpec
from tersor.core.errors import InputError, UnknownName
from tersor.measure.verdict import Tolerance
from tersor.recipe import Recipe
from tersor.search.runners.contract import TrialSpec
from tersor.search.runners.processes import ProcessRunner
from tersor.search.runners.serial import SerialRunner
from tersor.search.trials import Trials, recipes_over, smallest_within
from tersor.tasks.data import Data
from zoo import ZOO

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
"""
LOTTERY = Recipe.from_yaml("steps: [{step: lottery, sparsity: 0.5, fraction: 0.5, num_steps: 4, num_evaluations: 0}]")
STUDENT = Recipe.from_yaml("steps: [{step: student, width: 0.5}, {scheme: int8}]")


@pytest.fixture
def points(tmp_path, monkeypatch):
    """A spec of a small model of its own, and of points that a line parts."""
    (tmp_path / "runner_model.py").write_text(MODEL)
    x = np.random.default_rng(0).normal(size=(80, 8)).astype(np.float32)
    np.savez(tmp_path / "points.npz", x=x, y=(x[:, 0] > 0) * 1, x_train=x, y_train=(x[:, 0] > 0) * 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield TrialSpec(ModelSpec("runner_model:make"), Data("classification", tmp_path / "points.npz"))
    sys.modules.pop("runner_model", None)


@pytest.fixture
def texts(tmp_path):
    """A spec of a small language model in a folder, and of token windows of a text."""
    ZOO["llama"].model().save_pretrained(tmp_path / "llama")
    np.savez(tmp_path / "ids.npz", x=np.random.default_rng(0).integers(0, 20, (40, 6)))
    return TrialSpec(ModelSpec(tmp_path / "llama"), Data("fidelity", tmp_path / "ids.npz"), curvature=False)


def of_every_kind(points, texts):
    """A trial of a search for a drop, for a noise level, for a ticket, and for a student's width."""
    return [
        replace(points, recipe=Recipe.of("gptq:int4", {"2": "int8"})),
        replace(points, recipe=Recipe.of("waterfill(level=0.05):coded")),
        *(replace(points, recipe=recipe) for recipe in recipes_over(LOTTERY, 0, "sparsity", [0.5, 0.75])),
        *(replace(texts, recipe=recipe) for recipe in recipes_over(STUDENT, 0, "width", [0.5])),
    ]


def test_processes_give_what_one_process_gives(points, texts):
    specs = of_every_kind(points, texts)
    assert pickle.loads(pickle.dumps(specs)) == specs
    serial = list(SerialRunner().run(specs))
    with ProcessRunner(1) as runner:
        apart = list(runner.run(specs))
        with pytest.raises(UnknownName, match="site pattern 'nowhere'"):
            list(runner.run([replace(points, recipe=Recipe.of("int8", exclude="nowhere"))]))
    for one, other, spec in zip(serial, apart, specs, strict=True):
        assert one.spec == other.spec == spec
        assert (one.recipe, one.num_bytes, one.losses) == (other.recipe, other.num_bytes, other.losses)
        assert np.array_equal(one.scores.examples, other.scores.examples)
    assert serial[0].recipe.weights[0].rules == {"2": "gptq:int8"}
    assert set(serial[2].losses) == {"lottery, round 0 of 1", "lottery, round 1 of 1"}
    assert len({result.num_bytes for result in serial}) == 4  # pruned weights are still there


def test_what_trials_share_is_opened_once(points, monkeypatch):
    opened, open_spec = [], ModelSpec.open
    monkeypatch.setattr(ModelSpec, "open", lambda spec: opened.append(spec) or open_spec(spec))
    runner = SerialRunner()
    first, second = runner.run([replace(points, recipe=Recipe.of(scheme)) for scheme in ("int8", "int4")])
    assert len(opened) == 1
    assert runner.model_of(first.spec) is None
    assert runner.model_of(second.spec).recipe == second.recipe
    list(runner.run([replace(points, seed=1)]))
    assert len(opened) == 2


def test_a_trial_is_what_compress_makes(points):
    (result,) = SerialRunner().run([replace(points, recipe=Recipe.of("int4"))])
    made = tersor.compress("runner_model:make", "int4", "classification", data=points.data.path, batch_sizes=1)
    assert made.scorecards[1].file_bytes == result.num_bytes
    assert made.scorecards[1].score == result.scores.value
    assert made.recipe.steps == result.recipe.steps


def test_the_sparsest_ticket_within_a_drop(points):
    runner = SerialRunner()
    (original,) = runner.run([points])
    told = []
    trials = Trials(points, runner, original.scores, Tolerance.parse("90%"), told.append)
    found = trials.run_all(recipes_over(LOTTERY, 0, "sparsity", [0.5, 0.75]))
    assert found == told == trials.finished
    assert all(trial.verdict.alpha == pytest.approx(0.05 / 2) for trial in found)
    assert smallest_within(found) is found[0]


def test_what_is_in_memory_stays_in_its_process(points):
    with ProcessRunner(1) as runner:
        with pytest.raises(InputError, match="the model is in memory"):
            list(runner.run([replace(points, model=ModelSpec(nn.Linear(2, 2)))]))
        task = points.data.open()
        with pytest.raises(InputError, match="the task is in memory"):
            list(runner.run([replace(points, data=Data(task))]))


def test_a_field_that_a_step_does_not_have():
    with pytest.raises(InputError, match="step 0, speed 3"):
        recipes_over(LOTTERY, 0, "speed", [3])
