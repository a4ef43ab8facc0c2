"""Score a model and show how far it is: one forward pass, one step of the bar."""

from collections.abc import Callable

from torch import nn

from tersor.tasks.contract import Task
from tersor.tasks.scores import Scores


def score(task: Task, model: nn.Module, progress: Callable[[str, int, int], None], what: str) -> Scores:
    """`task.score(model, "eval")`, reporting `(what, batches done, batches in all)`."""
    total, done = sum(1 for _ in task.batches("eval")), 0

    def count(*_: object) -> None:
        nonlocal done
        done = min(done + 1, total)
        progress(what, done, total)

    progress(what, 0, total)
    handle = model.register_forward_hook(count)
    try:
        scores = task.score(model, "eval")
    finally:
        handle.remove()
    progress(what, total, total)
    return scores
