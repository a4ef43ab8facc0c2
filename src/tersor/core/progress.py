"""Progress: what is being done, how much of it is done, and of how much."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what, done, total


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""
