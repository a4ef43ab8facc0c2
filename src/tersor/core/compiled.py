"""Loops compiled by numba, and kept: only the first process on a machine waits for the compiler."""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(*signatures: str) -> Callable[[Any], Any]:
    """`njit` for these signatures, or for those it is called with, each at its first call. Runs without the
    interpreter's lock; kept beside the file, or in the user's cache folder, or nowhere if neither can be written."""
    given = list(signatures) or None

    def compile(function: Any) -> Any:
        try:
            made: Any = njit(given, nogil=True, cache=True, error_model="numpy")(function)
            forget_unreadable(made._cache)
            return made
        except RuntimeError:  # no folder to keep compiled code in
            return njit(given, nogil=True, error_model="numpy")(function)

    return compile


def forget_unreadable(cache: Any) -> None:
    """Empty the file of a function whose list of compiled forms names types that an older version of tersor had: numba
    reads the whole list before it looks whether it is of today."""
    try:
        cache._cache_file._load_index()
    except Exception:  # whatever unpickling raises
        cache.flush()
