"""The loss that each format causes at each site: predicted from the curvature, and measured for a sample.

The prediction is `1/2 sum F_ij D_ij^2` with the Fisher information F of calibration/curvature.py, as the allocator uses
it (the second-order saliency of LeCun et al. 1990, "Optimal Brain Damage",
https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html). What is measured is the
same quantity: one site is compressed, everything else kept, and the outputs are compared with the original's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from torch import nn

from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.divergence import UNITS, divergence, outputs
from tersor.core.progress import Progress, silent
from tersor.nn.sites import escape
from tersor.pipeline import run
from tersor.recipe import Recipe
from tersor.schemes.scheme import KEEP, parse_rule
from tersor.search.plan import Menu, measure_menus
from tersor.tasks.contract import Task
from tersor.tasks.scores import spearman

SCHEMES = ("int8", "int4-g64", "int3-g64", "int2-g64", "nf4", "2:4")


@dataclass(frozen=True)
class Measured:
    """The measured loss of one site in one scheme, with all others in float."""

    site: str
    scheme: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Sensitivity:
    """The loss of every scheme at every site.

    Attributes:
        unit: unit of all losses.
        sites: predicted loss by scheme and by site, the sites that can lose most first; schemes that do not fit a
            site's shape are left out.
        sample: the pairs that were measured as well, the smallest prediction first.
    """

    unit: str
    sites: dict[str, dict[str, float]]
    sample: list[Measured]

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of predicted and measured losses; NaN for fewer than three."""
        if len(self.sample) < 3:
            return nan
        return float(spearman(np.array([[m.predicted, m.measured] for m in self.sample])))

    def to_dict(self) -> dict[str, Any]:
        correlation = None if len(self.sample) < 3 else self.correlation
        sample = [vars(measured) for measured in self.sample]
        return {"unit": self.unit, "sites": self.sites, "sample": sample, "correlation": correlation}


def sensitivity(
    model: nn.Module,
    task: Task,
    schemes: Iterable[str] = SCHEMES,
    *,
    num_measured: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Predict the loss of every scheme at every site from the task's calibration split.

    Args:
        num_measured: how many pairs of site and scheme, spread over the range of predictions, are measured as well, on
            the first examples of the eval split.

    Raises:
        UnknownName, InputError: a scheme does not exist.
    """
    named = [str(parse_rule(text) or KEEP) for text in schemes]
    stats = estimate_fisher(model, task, seed=seed, progress=progress)
    menus = measure_menus(model, stats, Recipe.of(KEEP).weights[0], [KEEP, *named], progress)
    losses = {menu.site.name: losses_of(menu) for menu in menus}
    worst_first = sorted(losses, key=lambda name: max(losses[name].values(), default=0.0), reverse=True)
    picked = spread([(loss, name, scheme) for name in losses for scheme, loss in losses[name].items()], num_measured)
    sample = []
    original = list(outputs(model, task)) if picked else []
    for done, (predicted, name, scheme) in enumerate(picked):
        progress("measuring a sample", done, len(picked))
        made = run(Recipe.of(KEEP, {escape(name): scheme}, seed=seed), model, task, stats=stats).model
        sample.append(Measured(name, scheme, predicted, divergence(original, outputs(made, task), task.output)))
    progress("measuring a sample", len(picked), len(picked))
    return Sensitivity(UNITS[task.output], {name: losses[name] for name in worst_first}, sample)


def losses_of(menu: Menu) -> dict[str, float]:
    """The predicted loss of one site in each scheme, by scheme."""
    return {option.scheme: option.loss for option in menu.options if option.scheme != KEEP}


def spread(pairs: list[tuple[float, str, str]], num: int) -> list[tuple[float, str, str]]:
    """`num` of the pairs, evenly spaced in the order of their losses, the extremes included."""
    ordered = sorted(pairs)
    places = np.linspace(0, len(ordered) - 1, min(num, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]
