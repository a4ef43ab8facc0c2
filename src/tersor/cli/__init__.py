"""The command line: one file per verb. It turns flags into a library call, and the result into tables or JSON."""

import os
import sys
from collections.abc import Callable

# Spinning OpenMP threads stall each other badly when the machine has other work; sleeping ones do not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

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
from tersor.cli.student import student
from tersor.cli.targets import targets
from tersor.cli.unpack import unpack
from tersor.cli.verify import verify
from tersor.errors import TersorError

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


def main() -> None:
    """Entry point: errors that tersor raises on purpose are one message and exit status 2."""
    try:
        app()
    except TersorError as error:
        fail(str(error), as_json="--json" in sys.argv)
    except OSError as error:  # a name that is no name, a folder or a file that may not be read
        place = f"{str(error.filename)[:200]}: " if error.filename else ""
        fail(f"{place}{error.strerror or error}", as_json="--json" in sys.argv)
    except KeyboardInterrupt:
        fail("stopped; nothing was written", as_json="--json" in sys.argv, status=130)
