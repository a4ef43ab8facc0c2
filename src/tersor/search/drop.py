"""The smallest model whose verdict stays `within`: bisect the size, and let the paired test decide each trial.

Every trial is one more chance to be fooled by the evaluation sample, so each is judged at alpha / number of trials
(Bonferroni). For sizes fixed beforehand the final claim then holds with 95 % confidence; bisection picks them as it
goes, so take it as about that.
"""

from torch import nn

from tersor.search.limit import Limit
from tersor.search.plan import Menu, largest_size, plan_size, smallest_size
from tersor.search.trials import NUM_TRIALS, Trials


def search_drop(model: nn.Module, menus: list[Menu], trials: Trials, *, num_trials: int = NUM_TRIALS) -> None:
    """Run trials; the smallest that is within is the answer.

    Bisection on the logarithm of the size, between the smallest and the largest file the candidates reach.
    """
    low, high = smallest_size(model, menus), largest_size(model, menus)
    for _ in range(num_trials):
        num_bytes = max(low, int((low * high) ** 0.5))
        recipe = plan_size(model, menus, Limit(num_bytes, "this trial"), trials.spec.seed)
        trial = trials.run(recipe, num_trials)
        low, high = (low, num_bytes) if trial.verdict.outcome == "within" else (num_bytes, high)
        if high - low < 0.005 * high:
            break
