"""The command line: one file per verb. It turns flags into a library call, and the result into tables or JSON."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

# Spinning OpenMP threads stall each other badly when the machine has other work; sleeping ones do not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from tersor.checkpoint.output import finished
from tersor.cli.bench import bench
from tersor.cli.compare import compare
from tersor.cli.compress import compress
from tersor.cli.console import fail
from tersor.cli.evaluate import evaluate
from tersor.cli.explain import explain
from tersor.cli.export import export
from tersor.cli.finetune import finetune
from tersor.cli.formats import formats
from tersor.cli.info import info
from tersor.cli.inspect import inspect
from tersor.cli.merge import merge
from tersor.cli.methods import methods
from tersor.cli.pack import pack
from tersor.cli.signals import Stopped, stoppable
from tersor.cli.student import student
from tersor.cli.targets import targets
from tersor.cli.unpack import unpack
from tersor.cli.verify import verify
from tersor.core.errors import TersorError
from tersor.core.memory import is_out_of_memory
from tersor.core.messages import first_line

VERBS: list[Callable[..., None]] = [
    compress,
    inspect,
    evaluate,
    compare,
    bench,
    explain,
    export,
    pack,
    unpack,
    verify,
    info,
    student,
    finetune,
    merge,
    formats,
    methods,
    targets,
]

app = typer.Typer(
    help="State a budget. Get the best model that fits it, and the proof of what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)


def show_version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        print(f"tersor {version('tersor')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """State a budget. Get the best model that fits it, and the proof of what it cost."""


def main() -> None:
    """Entry point: errors that tersor raises on purpose, and those of the system (disk, permissions, memory), are one
    message and exit status 2; a command that is stopped says what is kept."""
    as_json, num_finished = "--json" in sys.argv, len(finished)
    try:
        with stoppable():
            app()
    except TersorError as error:
        fail("; ".join([str(error), *notes_on(error)]), as_json=as_json)
    except Stopped as stop:
        whole = [f"{path} is whole" for path in finished[num_finished:]]
        kept = "; ".join(notes_on(stop) or whole or ["nothing was written"])
        fail(f"stopped by {stop}; {kept}", as_json=as_json, status=128 + stop.number)
    except OSError as error:
        fail("; ".join([told(error), *notes_on(error)]), as_json=as_json)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory ({first_line(error)}); make room, or work on smaller batches or a smaller model"
        fail("; ".join([message, *notes_on(error)]), as_json=as_json)


def notes_on(error: BaseException) -> list[str]:
    """The notes that were added to an error on its way, such as what is kept."""
    return getattr(error, "__notes__", [])


def told(error: OSError) -> str:
    """The message of an operating system error, and the file or folder it is about."""
    place = f"{str(error.filename)[:200]}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
