"""Names of methods and of their options that have changed. The old ones are read for one release, with a warning."""

import warnings
from collections.abc import Container, Mapping

METHOD_NAMES = {"kept": "zero-mask"}
OPTION_NAMES = {"drift": "upstream_correction"}


def renamed(names: Mapping[str, str], name: str, known: Container[str]) -> str:
    """The name of today for a name that may be an old one.

    Args:
        names: old names and the new ones.
        known: the names of today; an old name counts only where its new one is among them.
    """
    new = names.get(name)
    if new is None or name in known or new not in known:
        return name
    warnings.warn(f"{name} is called {new} now; the old name will be read for one release", FutureWarning, stacklevel=2)
    return new
