"""Every error tersor raises on purpose.

    TersorError
    ├── InputError          a model, file, or argument cannot be used as given
    │   ├── UnknownName     a format, method, task, ... that no table holds (says the nearest name)
    │   ├── ModelError      a checkpoint that cannot be read, holds NaN, or names code
    │   └── DataError       task data that is empty, malformed or of the wrong kind
    ├── FormatError         a weight does not fit a format
    ├── BudgetError         no reachable model meets the budget (carries the nearest points)
    ├── ArtifactError       an artifact is damaged, incomplete, or the output cannot be written
    └── MissingExtra        an optional dependency is not installed (says the pip command)

A message says the value, the place and the way out. The command line prints it without a traceback and exits with 2.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class TersorError(Exception):
    """Base of all; `except tersor.TersorError` catches exactly what tersor raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors go from process to process by their message, whatever they were made from."""
        return remade, (type(self), str(self)), self.__dict__


def remade(kind: type[TersorError], message: str) -> TersorError:
    """An error of this kind and message.

    >>> import pickle
    >>> pickle.loads(pickle.dumps(UnknownName("method", "gtpq", ["gptq"])))
    UnknownName("unknown method 'gtpq': did you mean 'gptq'? known: gptq")
    """
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


class InputError(TersorError):
    """A model, file or argument cannot be used as given."""


class UnknownName(InputError):
    """A name that its table does not hold.

    >>> str(UnknownName("method", "gtpq", ["gptq", "nearest"]))
    "unknown method 'gtpq': did you mean 'gptq'? known: gptq, nearest"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], see: str = ""):
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        listing = see or f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} '{name}': {hint}{listing}")


class ModelError(InputError):
    """A checkpoint that cannot be read, holds NaN, or names code."""


class DataError(InputError):
    """Task data that is empty, malformed, or of the wrong kind."""


class FormatError(TersorError):
    """A weight does not fit a format."""


class BudgetError(TersorError):
    """No reachable model meets the budget; the message names the nearest reachable point and what binds."""


class ArtifactError(TersorError):
    """An artifact is damaged or incomplete, or the output cannot be written."""


class MissingExtra(TersorError):
    """An optional dependency is not installed.

    >>> str(MissingExtra("vision", "image folders"))
    "image folders needs an extra: pip install 'tersor[vision]'"
    """

    def __init__(self, extra: str, what: str):
        super().__init__(f"{what} needs an extra: pip install 'tersor[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error of Python, NumPy, torch or a runtime means that memory ran out."""
    words = ("allocate memory", "out of memory", "bad_alloc", "bad allocation", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)
