"""Flags that several verbs take, and how their texts become values."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tersor.core.errors import InputError, UnknownName
from tersor.jobs.task_choice import TaskChoice

Weights = Annotated[
    Path | None,
    typer.Option(help="Safetensors state dict, or artifact folder, of a MODEL given as package.module:factory."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="classification, similarity, perplexity, fidelity (the default: agreement with the original), "
        "or your own as package.module:factory."
    ),
]
Data = Annotated[
    Path | None, typer.Option(help="The task's data. Without it: fidelity on the standard library's docstrings.")
]
Calibration = Annotated[
    Path | None, typer.Option(help="Separate calibration data. Without it, a part of --data is held out.")
]
Train = Annotated[
    Path | None, typer.Option(help="Data to train on, as --data is written. Arrays may bring x_train, y_train instead.")
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task-option", help="KEY=VALUE for the task: batch_size, max_length, context, stride, ... Repeatable."
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(
        help="Batch sizes for latency, separated by commas; 1,32 if not given, and 1 for language models, which read "
        "a prompt and write."
    ),
]
TimingSeconds = Annotated[
    float | None,
    typer.Option(help="Seconds that timing may take. Without it: as long as the work before it, and a minute at most."),
]
Drop = Annotated[str, typer.Option(help="Largest tolerated loss of the score: 1% (relative) or 0.01 (absolute).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ExitCode = Annotated[
    bool,
    typer.Option("--exit-code", help="End with status 1 where the verdict is `exceeds`, 3 where it is `cannot tell`."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if tersor wrote every file in it, and none was changed since.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="What the model computes in: float32, bfloat16 or float16. Without it: as it was saved."),
]
Threads = Annotated[int, typer.Option(help="CPU threads for latency.")]


def task_choice(
    task: str | None,
    data: Path | None,
    calibration: Path | None,
    options: list[str] | None,
    train: Path | None = None,
) -> TaskChoice:
    """The task's flags as the library takes them."""
    return TaskChoice(task, data, calibration, dict(key_value(text, "--task-option") for text in options or []), train)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(text: str | None) -> torch.dtype | None:
    """A `--dtype`. Raises UnknownName for another one."""
    if text is not None and text not in DTYPES:
        raise UnknownName("--dtype", text, DTYPES)
    return None if text is None else DTYPES[text]


def key_value(text: str, flag: str) -> tuple[str, Any]:
    """`context=512` as a pair; numbers become numbers, and `a,b,c` of numbers a tuple."""
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise InputError(f"{flag} '{text}' is not KEY=VALUE")
    return key.strip(), number(value.strip())


def number(text: str) -> Any:
    """
    >>> number("512"), number("0.5,0.25"), number("mean")
    (512, (0.5, 0.25), 'mean')
    """
    if "," in text:
        return tuple(number(part.strip()) for part in text.split(","))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def batch_sizes(text: str | None) -> tuple[int, ...] | None:
    """Parse `1,32` as batch sizes."""
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch '{text}' is not a list of batch sizes; write for example 1,32")
    return sizes


def checked_seconds(seconds: float | None) -> float | None:
    """A time that is longer than nothing."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InputError(f"--timing-seconds {seconds} is no time; write for example 120")
    return seconds


def checked_threads(threads: int) -> int:
    """At least one thread."""
    if threads < 1:
        raise InputError(f"--threads {threads} is not a number of threads; write for example 1")
    return threads
