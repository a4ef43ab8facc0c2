"""Loops compiled by numba, and kept: only the first process on a machine waits for the compiler."""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import config, njit
from numba.core.caching import FunctionCache

# NUMBA_DISABLE_JIT=1 has loops run as Python, which a debugger can follow.
CAN_COMPILE: bool = not config.DISABLE_JIT  # type: ignore[attr-defined]


def compiled(*signatures: str) -> Callable[[Any], Any]:
    """`njit` for these signatures, or for those it is called with, each at its first call. Runs without the
    interpreter's lock; kept beside the file, or in the user's cache folder, or nowhere if neither can be written."""

    def compile(function: Any) -> Any:
        if not CAN_COMPILE:
            return function
        made: Any = njit(nogil=True, error_model="numpy")(function)
        with suppress(RuntimeError):  # no folder to keep compiled code in
            made._cache = Kept(function)
        for signature in signatures:
            made.compile(signature)
        if signatures:
            made.disable_compile()
        return made

    return compile


class Kept(FunctionCache):
    """The compiled forms of a function in files, which may be damaged, name types that an older version of tersor had,
    or lie where nothing can be written any more: then it is compiled as if there were none."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling raises
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
