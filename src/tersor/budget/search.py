"""The smallest model whose verdict stays `within`: bisect the size, and let the paired test decide each trial.

Every trial is one more chance to be fooled by the evaluation sample, so each is judged at alpha / number of trials
(Bonferroni). For sizes fixed beforehand the final claim then holds with 95 % confidence; bisection picks them as it
goes, so take it as about that.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tersor.budget.limit import Limit
from tersor.budget.plan import Menu, largest_size, plan_size, smallest_size
from tersor.checkpoint.container_write import size_of
from tersor.compress import compress
from tersor.core.progress import Progress, silent
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.recipe import Recipe
from tersor.scores import Scores
from tersor.stats import Stats
from tersor.tasks.contract import Task
from tersor.tasks.progress import score

NUM_TRIALS = 7
ALPHA = 0.05


@dataclass(frozen=True)
class Trial:
    """One measured point of the frontier."""

    num_bytes: int
    score: float
    verdict: Verdict
    recipe: Recipe


def search_drop(
    model: nn.Module,
    task: Task,
    original: Scores,
    menus: list[Menu],
    tolerance: Tolerance,
    stats: dict[str, Stats],
    *,
    seed: int = 0,
    num_trials: int = NUM_TRIALS,
    progress: Progress = silent,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Measured trials, in the order they ran; `smallest_within` picks the answer.

    Bisection on the logarithm of the size, between the smallest and the largest file the candidates reach.
    """
    low, high = smallest_size(model, menus), largest_size(model, menus)
    trials: list[Trial] = []
    for number in range(num_trials):
        num_bytes = max(low, int((low * high) ** 0.5))
        recipe = plan_size(model, menus, Limit(num_bytes, "this trial"), seed)
        compressed = compress(model, recipe, task, stats=stats, progress=progress).model
        scores = score(task, compressed, progress, f"evaluating trial {number + 1} of at most {num_trials}")
        verdict = judge(original, scores, tolerance, alpha=ALPHA / num_trials, seed=seed)
        trials.append(Trial(size_of(compressed), scores.value, verdict, recipe))
        on_trial(trials[-1])
        low, high = (low, num_bytes) if verdict.outcome == "within" else (num_bytes, high)
        if high - low < 0.005 * high:
            break
    return trials


def smallest_within(trials: list[Trial]) -> Trial | None:
    """The smallest trial whose verdict is `within`; None when there is none."""
    return min((t for t in trials if t.verdict.outcome == "within"), key=lambda t: t.num_bytes, default=None)


def nearest_points(trials: list[Trial]) -> str:
    """The trials with the least drop, for the message of an infeasible search."""
    closest = sorted(trials, key=lambda t: t.verdict.drop)[:3]
    return "; ".join(f"{t.num_bytes:,} bytes: {t.verdict.sentence()}" for t in closest)
