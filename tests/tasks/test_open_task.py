"""The way in: names, options and a user's own task."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tersor.core.errors import DataError, InputError, UnknownName
from tersor.tasks import TASKS, open_task, task_options
from tersor.tasks.options import HELP

OWN = """
import numpy as np
from tersor.tasks.scores import METRICS, Scores

class Own:
    name, output, description, fingerprint = "own", "values", "mine", "0"
    def __init__(self, data=None): self.data = data
    def prepare(self, original): pass
    def batches(self, split, batch_size=None): return iter([1])
    def forward(self, model, batch): return model(batch)
    def score(self, model, split="eval"): return Scores(METRICS["mean"], np.ones((1, 1)))

class Half:
    name, output = "half", "values"

class Wrong(Own):
    output = "words"

broken = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_option_is_explained_and_none_is_idle():
    used = {option for name in TASKS for option in task_options(name)}
    assert used == set(HELP)


def test_unknown_names_say_the_nearest():
    with pytest.raises(UnknownName, match="unknown task 'perplexty': did you mean 'perplexity'"):
        open_task("perplexty", None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"contxt": 3}, "task 'classification' has no option 'contxt'; it takes batch_size, max_length"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number from 1"),
        ({"batch_size": "8"}, "expected a whole number"),
        ({"batch_size": True}, "expected a whole number"),
        ({"std": 0}, "expected numbers above 0"),
        ({"mean": [0.5, "x"]}, "expected a number or a list"),
        ({"mean": []}, "empty list"),
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers; expected 1 or one per channel"),
    ],
)
def test_impossible_options(tmp_path, options, says):
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 3)), y=np.zeros(20))
    with pytest.raises(InputError, match=says):
        list(open_task("classification", tmp_path / "data.npz", options=options).batches("eval"))


def test_batch_size_and_split_are_checked_where_they_are_used(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 3)), y=np.zeros(20))
    task = open_task("classification", tmp_path / "data.npz", options={"max_examples": None})
    with pytest.raises(InputError, match="batch_size is 0"):
        list(task.batches("eval", 0))
    with pytest.raises((InputError, TypeCheckError), match="test"):
        list(task.batches("test"))


def test_a_users_own_task_is_imported_and_checked(own):
    assert open_task("own_task:Own", None).data is None
    assert open_task("own_task:Own", own).data == own
    with pytest.raises(InputError, match="without description, fingerprint, prepare, batches, forward, score"):
        open_task("own_task:Half", None)
    with pytest.raises(InputError, match="output is 'words'"):
        open_task("own_task:Wrong", None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_task:absent", "has no callable 'absent'; it has Own, Half, Wrong"),
        ("own_task:broken", "has no callable 'broken'"),
        ("no_such_module_anywhere:f", "no module 'no_such_module_anywhere'"),
        (":f", "expected package.module:factory"),
    ],
)
def test_a_users_own_task_that_is_not_there(own, name, says):
    with pytest.raises(InputError, match=says):
        open_task(name, None)


def test_a_users_own_task_takes_no_options(own):
    with pytest.raises(InputError, match="no option 'context'"):
        open_task("own_task:Own", None, options={"context": 3})
    with pytest.raises(DataError, match="brings its own calibration"):
        open_task("own_task:Own", None, calibration=own)
