"""Who does the work of the entropy coder: numba's compiled loops, or numpy's where numba is not installed."""

from functools import cache
from types import ModuleType


@cache
def loops() -> ModuleType:
    """The module with the loops: compiled where numba is there."""
    try:
        from tersor.codecs import rans_numba
    except ImportError:
        from tersor.codecs import rans_numpy

        return rans_numpy
    return rans_numba
