"""Progress: what is being done, how much of it is done, and of how much."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[str, int, int], None]  # what, done, total


def silent(*_: Any) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Events:
    """Functions that a job calls while it works; those that are not given do nothing.

    Attributes:
        on_progress: called with the work in words, how much of it is done, and of how much.
        on_trial: called with every trial of a search, when it has finished.
        on_step: called with the number of the step of the recipe, or of the streamed block, that is finished, and the
            number of all.
        on_note: called with a sentence for the user.
    """

    on_progress: Progress = silent
    on_trial: Callable[[Any], None] = silent
    on_step: Callable[[int, int], None] = silent
    on_note: Callable[[str], None] = silent
