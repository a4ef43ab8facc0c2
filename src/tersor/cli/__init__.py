"""The command line: one file per verb, which turns flags into a library call and the result into tables or JSON.

A verb's file, and the libraries it needs, are imported when the verb is called: the help and a mistyped verb need none.
"""

import os
import sys
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, cast

# Spinning OpenMP threads stall each other badly when the machine has other work; sleeping ones do not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from typer.core import TyperCommand, TyperGroup

from tersor.checkpoint.output import finished
from tersor.cli.console import fail
from tersor.cli.signals import Stopped, stoppable
from tersor.core.errors import TersorError, is_out_of_memory
from tersor.core.messages import first_line

VERBS = {  # the verbs, each a module of this folder with a function of its name, and what they do
    "compress": "Make a model smaller under a budget, and prove what it cost.",
    "inspect": "List the weights that can be compressed (sites), all other tensors, and the cost of every format.",
    "evaluate": "Measure a model: bytes, memory, operations, latency, and its score with an interval.",
    "compare": "Measure two models on the same examples, in turn, and judge the difference.",
    "bench": "Time models in their runtimes side by side; a ratio within the noise is called no difference.",
    "explain": (
        "Say why a model is not faster: its time by kind of work, by layer, and against this machine's roofline."
    ),
    "export": "Write an artifact so that another runtime loads it, with exactly the values that were chosen.",
    "pack": (
        "Make a checkpoint smaller without changing a bit: its tensors as model.tersor, everything else as it came."
    ),
    "unpack": "Write plain safetensors that transformers loads; an artifact's packed weights are decoded.",
    "verify": (
        "Check the hash of every file, and every checksum and value of a model.tersor; for a file exported to a "
        "runtime, also try if this processor computes its int8 products exactly."
    ),
    "info": "Bits per weight of every site: stored, entropy, and the rate-distortion bound of normal weights.",
    "student": "Cut a smaller model from a larger one, to be taught by it.",
    "finetune": "Train a model on a task, whole or by adapters (LoRA, QLoRA, DoRA).",
    "merge": "Merge an adapter: into float weights by adding, into packed ones by rounding the sum anew.",
    "formats": (
        "List the formats, their bits per weight, and the method each gets when none is named, without and with data."
    ),
    "methods": "List the methods that choose quantized values, their options, and the formats they write.",
    "targets": (
        "List the clients of `tersor export --to`: what reads the file, which formats it holds, which extra it needs."
    ),
}


class Verb(TyperCommand):
    """A verb whose module is imported when it is called or its flags are listed, not for its line in the help."""

    def __init__(self, name: str, line: str):
        super().__init__(name, help=line)

    @cached_property
    def loaded(self) -> TyperCommand:
        """The command, with its flags."""
        verb = typer.Typer(add_completion=False)
        verb.command(self.name)(getattr(import_module(f"tersor.cli.{self.name}"), str(self.name)))
        return cast(TyperCommand, typer.main.get_command(verb))

    @property
    def params(self) -> list[Any]:
        return self.loaded.params

    @params.setter
    def params(self, _: list[Any]) -> None:
        """The parameters given to the constructor, of which there are none: the module of the verb has them."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        return self.loaded.make_context(*args, **options)


class Verbs(TyperGroup):
    """The group of all verbs, which imports none of their modules."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands = {name: Verb(name, line) for name, line in VERBS.items()}


app = typer.Typer(
    cls=Verbs,
    help="State a budget. Get the best model that fits it, and the proof of what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def show_version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        print(f"tersor {version('tersor')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """State a budget. Get the best model that fits it, and the proof of what it cost."""


def main() -> None:
    """Run the command line.

    A TersorError, or an error of the system (disk, permissions, memory), is printed as one message with exit status 2.
    A command that is stopped by a signal says which files are complete, with status 128 + its number.
    """
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
        fail("; ".join([system_message(error), *notes_on(error)]), as_json=as_json)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory ({first_line(error)}); make room, or work on smaller batches or a smaller model"
        fail("; ".join([message, *notes_on(error)]), as_json=as_json)


def notes_on(error: BaseException) -> list[str]:
    """The notes that were added to an error as it was raised, such as which files are complete."""
    return getattr(error, "__notes__", [])


def system_message(error: OSError) -> str:
    """The message of an operating system error, and the file or folder it is about."""
    place = f"{str(error.filename)[:200]}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
