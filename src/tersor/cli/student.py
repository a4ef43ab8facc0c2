"""`tersor student TEACHER --layers 3 -o OUT`: a smaller model to distil into."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import events, out, print_json, print_table
from tersor.core.errors import InputError
from tersor.jobs.settings import Output
from tersor.jobs.student import student as make_student
from tersor.report.card import megabytes
from tersor.training.student import StudentStep


def student(
    teacher: Annotated[str, typer.Argument(help="Hugging Face folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Hugging Face folder to create.")],
    layers: Annotated[
        str | None, typer.Option(help="How many layers, spread evenly (3), or which, counted from 0 (0,2,5).")
    ] = None,
    width: Annotated[float | None, typer.Option(help="Hidden size, heads and intermediate size times this.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Intermediate size of the feed-forward layers.")] = None,
    num_heads: Annotated[int | None, typer.Option("--heads", help="Attention heads.")] = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Cut a smaller model from a larger one, to be taught by it."""
    try:
        step = StudentStep(
            layers=parse_layers(layers), width=width, hidden=hidden, intermediate=intermediate, num_heads=num_heads
        )
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    with events(json) as listener:
        made = make_student(
            ModelSpec(teacher, dtype=options.dtype_named(dtype)), Output(output, overwrite), step, listener
        )
    sizes = made.sizes
    if json:
        print_json({"output": str(output), **sizes})
        return
    rows = [(name, *(shown(name, of[name]) for of in sizes.values())) for name in sizes["teacher"]]
    print_table("teacher and student", ["", *sizes], rows)
    out.print(
        f"student: {output}  (teach it: tersor compress {output} --recipe FILE, with a step distil and "
        f"teacher: {made.teacher})",
        markup=False,
        highlight=False,
    )


def parse_layers(text: str | None) -> int | tuple[int, ...] | None:
    """Parse `--layers`: `3` is how many, `0,2,5` are the numbers of layers to keep."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--layers '{text}' is not a number of layers or a list; write 3 or 0,2,5") from None
    return numbers if "," in text else numbers[0]


def shown(name: str, value: int) -> str:
    """A size of the model, by its name in the config, as text."""
    return megabytes(value) if name == "bytes" else f"{value:,}"
