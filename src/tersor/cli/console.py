"""Output that the verbs share: tables to stdout, progress and errors to stderr, or one JSON object."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tersor.core.progress import Events
from tersor.core.progress import Progress as Report


class Plain(Console):
    """A console that prints names as they are: no markup, emoji or escape sequence in them is obeyed."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)


def printable(text: object) -> str:
    r"""Text with control characters, which a terminal would obey or not show, written as escapes.

    >>> print(printable("wn:new \x1b[31m"))
    wn:new \x1b[31m
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


out = Plain(soft_wrap=True)
err = Plain(stderr=True, soft_wrap=True)


def fail(message: str, *, as_json: bool, status: int = 2) -> NoReturn:
    """Print one error message (to stderr, or as JSON) and exit with the status."""
    if as_json:
        print(json.dumps({"error": message}))
    else:
        err.print("error:", message, style="red", markup=False, highlight=False)
    sys.exit(status)


STATUS = {"within": 0, "exceeds": 1, "cannot tell": 3}  # 2 is for errors


def leave(outcome: str, exit_code: bool) -> None:
    """Exit with the status of a verdict, if the user asked for it (`--exit-code`)."""
    if exit_code and STATUS[outcome]:
        raise typer.Exit(STATUS[outcome])


def print_json(data: Any) -> None:
    """Print the result as JSON, the only thing on stdout."""
    print(json.dumps(data, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with numbers to the right and names to the left. Wide cells are wrapped, never cut."""
    table = Table(title=Text(printable(title)), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(str(row[index])[:1].isdigit() or str(row[index]) in ("", "-") for row in rows)
        table.add_column(Text(printable(column)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Plain(width=max(out.width, 100) if not out.is_terminal else None).print(table)


def show_note(note: str) -> None:
    """Print a note for the user on stderr."""
    err.print("note:", note, style="yellow", markup=False, highlight=False)


@contextmanager
def events(as_json: bool, **more: Callable[..., None]) -> Iterator[Events]:
    """A bar per kind of work, with rate and remaining time, on stderr, and then the notes; nothing under --json.

    Args:
        more: what else is shown, such as `on_trial`.
    """
    if as_json:
        yield Events()
        return
    notes: list[str] = []
    with progress_bars() as report:
        yield Events(report, on_note=notes.append, **more)
    for note in notes:
        show_note(note)


@contextmanager
def progress_bars() -> Iterator[Report]:
    """A bar per kind of work, with rate and remaining time, on stderr."""
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=err) as progress:
        bars: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            what = printable(what)
            kind = what.partition(":")[0]  # a loss that changes may follow
            if kind not in bars or (done == 0 and progress.tasks[bars[kind]].finished):
                bars[kind] = progress.add_task(what, total=total)
            progress.update(bars[kind], description=what, completed=done, total=total)

        yield report
