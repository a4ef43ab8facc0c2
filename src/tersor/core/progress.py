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
        on_progress: with what is being done, how much of it is done, and of how much.
        on_trial: with every trial of a search, when it is finished.
        on_step: with the number of the step of the recipe, or of the streamed block, that is finished, and how many
            there are.
        on_note: with a sentence that the user should know.
    """

    on_progress: Progress = silent
    on_trial: Callable[[Any], None] = silent
    on_step: Callable[[int, int], None] = silent
    on_note: Callable[[str], None] = silent
