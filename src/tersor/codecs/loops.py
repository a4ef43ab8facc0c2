"""The compiled loops of the entropy coder, imported where coding begins: numba takes half a second to import."""

from functools import cache
from types import ModuleType


@cache
def loops() -> ModuleType:
    """The module with the loops."""
    from tersor.codecs import rans_numba

    return rans_numba
