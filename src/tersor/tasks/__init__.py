"""Tasks: data, how to run the model on it, and a score per example.

`TASKS` is the whole list; `open_task` opens one. A new task is a file with a class that keeps the contract
(contract.py), a function that opens it from a Source, and a line in the table. The function's keyword arguments are the
task's options.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tersor.core.errors import DataError, UnknownName
from tersor.tasks.classification import open_classification
from tersor.tasks.contract import Output, Split, Task, TrainableTask
from tersor.tasks.custom import open_custom
from tersor.tasks.inputs import Batch
from tersor.tasks.options import check_options
from tersor.tasks.perplexity import open_perplexity
from tersor.tasks.similarity import open_similarity
from tersor.tasks.source import DataSource
from tersor.tasks.unlabelled import open_fidelity

__all__ = ["TASKS", "Batch", "DataSource", "Output", "Split", "Task", "TrainableTask", "open_task", "task_options"]

TASKS: dict[str, Callable[..., Task]] = {
    "classification": open_classification,
    "similarity": open_similarity,
    "perplexity": open_perplexity,
    "fidelity": open_fidelity,
}


def open_task(
    name: str | None,
    data: Path | None,
    *,
    tokenizer: Any = None,
    config: Any = None,
    model_folder: Path | None = None,
    calibration: Path | None = None,
    train: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """Open a task by name, or a user's own by `package.module:factory`; None is `fidelity`.

    `data` None makes fidelity read standard-library docstrings. `calibration` is a separate file (or folder) to
    calibrate on, `train` one to train on; all of `data` is then evaluated. `options` are those of `task_options(name)`;
    a user's own factory takes none, and is called with `data=` only where data is given.

    Raises UnknownName for a name not in the table, InputError for an unknown or impossible option, DataError for data
    that is missing, malformed, empty or of the wrong kind.
    """
    name = "fidelity" if name is None else name
    if ":" in name:
        check_options(name, options or {}, [])
        for given in (calibration, train):
            if given is not None:
                raise DataError(f"task '{name}' brings its own calibration and training data; leave out {given}")
        return open_custom(name, None if data is None else Path(data))
    if name not in TASKS:
        raise UnknownName("task", name, [*TASKS, "package.module:factory"])
    paths = [None if path is None else Path(path) for path in (data, calibration, model_folder, train)]
    source = DataSource(paths[0], paths[1], tokenizer, config, paths[2], paths[3])
    return TASKS[name](source, **check_options(name, options or {}, task_options(name)))


def task_options(name: str) -> list[str]:
    """The options a task takes.

    >>> task_options("similarity")
    ['batch_size', 'max_length', 'max_examples', 'calibration_examples']
    """
    parameters = inspect.signature(TASKS[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
