"""The smallest model whose verdict stays `within`: bisect the size, and let the paired test decide each trial.

Every trial is one more chance to be fooled by the evaluation sample, so each is judged at alpha / number of trials
(Bonferroni). For sizes fixed beforehand the final claim then holds with 95 % confidence; bisection picks them as it
goes, so take it as about that.
"""

from torch import nn

from tersor.core.progress import Events
from tersor.methods.stats import Stats
from tersor.pipeline import Compressed, run
from tersor.recipe import Recipe
from tersor.search.limit import Limit
from tersor.search.plan import Menu, largest_size, plan_size, smallest_size
from tersor.search.trials import NUM_TRIALS, Trials


def search_drop(
    model: nn.Module,
    menus: list[Menu],
    stats: dict[str, Stats],
    trials: Trials,
    *,
    num_trials: int = NUM_TRIALS,
) -> None:
    """Run trials; the smallest that is within is the answer.

    Bisection on the logarithm of the size, between the smallest and the largest file the candidates reach.
    """

    def make(recipe: Recipe) -> Compressed:
        return run(recipe, model, trials.task, stats=stats, events=Events(trials.progress))

    low, high = smallest_size(model, menus), largest_size(model, menus)
    for _ in range(num_trials):
        num_bytes = max(low, int((low * high) ** 0.5))
        trial = trials.run(plan_size(model, menus, Limit(num_bytes, "this trial"), trials.seed), make, num_trials)
        low, high = (low, num_bytes) if trial.verdict.outcome == "within" else (num_bytes, high)
        if high - low < 0.005 * high:
            break
