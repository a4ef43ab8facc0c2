"""A user's choice of a task and its data, which a model's own files then help to open."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from tersor.core.errors import InputError, ModelError
from tersor.core.messages import first_line
from tersor.tasks import Task, open_task


class Opened(Protocol):
    """A model in memory, and the folder that it came from (None where it came from none)."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def folder(self) -> Path | None: ...


@dataclass(frozen=True)
class Data:
    """The choice of a task, its data and its options.

    Attributes:
        task: a name in `TASKS`, a `package.module:factory`, or a task in memory, with its own data; None: fidelity.
        path: file or folder of the task's data; None: fidelity reads the standard library's docstrings.
        calibration: separate data to calibrate on; None: a part of the data is held out.
        train: separate data to train on.
        options: options of the task, such as `batch_size` or `max_length`.
    """

    task: str | Task | None = None
    path: Path | None = None
    calibration: Path | None = None
    train: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_given(self) -> bool:
        """True if anything was chosen."""
        return any((self.task, self.path, self.calibration, self.train, self.options))

    def open(self, source: Opened | None = None) -> Task:
        """The task, with the tokenizer and the configuration of a model where one is given.

        Raises InputError, DataError and UnknownName as `open_task` does, and ModelError for a damaged tokenizer.
        """
        if self.task is not None and not isinstance(self.task, str):
            if self.path or self.calibration or self.train or self.options:
                raise InputError(
                    f"task {self.task.name}: a task in memory brings its own data and options; leave them out"
                )
            return self.task
        folder = source.folder if source is not None else None
        return open_task(
            self.task,
            self.path,
            tokenizer=None if folder is None else tokenizer_in(folder),
            config=None if source is None else getattr(source.model, "config", None),
            model_folder=folder,
            calibration=self.calibration,
            train=self.train,
            options=self.options,
        )


def tokenizer_in(folder: Path) -> Any:
    """The Hugging Face tokenizer of a model's folder; None where there is none. Raises ModelError for a damaged one."""
    if not re.search(r"tokenizer|vocab", " ".join(path.name for path in folder.iterdir())):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file trips over
        raise ModelError(f"{folder}: the tokenizer cannot be read ({first_line(error)})") from None
