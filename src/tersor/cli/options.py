"""Flags that several verbs share, and the parsers of their values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.open import dtype_named as dtype_named
from tersor.core.errors import InputError
from tersor.jobs.settings import Timing
from tersor.tasks import TASKS
from tersor.tasks.data import Data as TaskData
from tersor.tasks.options import HELP

Weights = Annotated[
    Path | None,
    typer.Option(
        help="State dict (.safetensors, .pt, .bin), or artifact folder, of a MODEL given as package.module:factory."
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(TASKS)}, or your own as package.module:factory. Without it: fidelity, the agreement with the "
        "original."
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
    typer.Option("--task-option", help=f"KEY=VALUE for the task: {', '.join(list(HELP)[:4])}, ... Repeatable."),
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
    typer.Option("--exit-code", help="Exit with status 1 if the verdict is `exceeds`, 3 if it is `cannot tell`."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if tersor wrote every file in it, and none was changed since.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type to compute in: float32, bfloat16 or float16. Without it: the type it was saved in."),
]
Threads = Annotated[int, typer.Option(help="CPU threads for latency.")]


def task_data(
    task: str | None,
    data: Path | None,
    calibration: Path | None = None,
    options: list[str] | None = None,
    train: Path | None = None,
) -> TaskData:
    """The `Data` (task, paths, options) that the flags of a task describe."""
    pairs = dict(key_value(text, "--task-option") for text in options or [])
    return TaskData(task, data, calibration, train, pairs)


def models_of(names: Sequence[str], weights: Sequence[Path] | None, dtype: str | None) -> list[ModelSpec]:
    """Several models; `--weights` go to the factories among them, in their order."""
    factories = [name for name in names if ":" in name and not Path(name).exists()]
    if len(weights or ()) > len(factories):
        raise InputError(
            f"{len(weights or ())} --weights for {len(factories)} models given as package.module:factory; one each"
        )
    files = iter([*(weights or ()), *[None] * len(names)])
    kind = dtype_named(dtype)
    return [ModelSpec(name, next(files) if name in factories else None, kind) for name in names]


def key_value(text: str, flag: str) -> tuple[str, Any]:
    """Parse `context=512` into a pair; numbers are converted, and `1,2,3` becomes a tuple."""
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


def whole_numbers(text: str, flag: str, example: str) -> tuple[int, ...]:
    """Parse `1,32` as numbers from 1."""
    numbers = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(numbers) < 1:
        raise InputError(f"{flag} '{text}' is not a list of whole numbers from 1; write for example {example}")
    return numbers


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Parse `3,224,224` as a shape."""
    return None if text is None else whole_numbers(text, "--shape", "3,224,224")


def timing(batch: str | None, threads: int, timing_seconds: float | None) -> Timing:
    """The settings by which the speed of models on a task's examples is measured."""
    sizes = None if batch is None else whole_numbers(batch, "--batch", "1,32")
    return Timing(sizes, (threads,), timing_seconds)
