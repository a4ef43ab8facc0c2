"""Which task a job scores, and on which data: chosen by the user, or by what the model is."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.checkpoint.source import Source
from tersor.core.errors import ModelError
from tersor.core.messages import first_line
from tersor.tasks import Task, open_task


@dataclass(frozen=True)
class TaskChoice:
    """The user's choice of a task and its data; each field is a flag of the command line."""

    task: str | None = None
    data: Path | None = None
    calibration: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    train: Path | None = None


def open_task_for(source: Source, choice: TaskChoice) -> Task:
    """The task, with the model's tokenizer where it has one."""
    tokenizer = config = None
    if source.folder is not None and re.search(r"tokenizer|vocab", " ".join(p.name for p in source.folder.iterdir())):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        except Exception as error:  # whatever a damaged file trips over
            raise ModelError(f"{source.folder}: the tokenizer cannot be read ({first_line(error)})") from None
    config = getattr(source.model, "config", None)
    return open_task(
        choice.task,
        choice.data,
        tokenizer=tokenizer,
        config=config,
        model_folder=source.folder,
        calibration=choice.calibration,
        train=choice.train,
        options=choice.options,
    )
