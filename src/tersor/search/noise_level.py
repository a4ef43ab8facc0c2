"""Search for the noise level, the one number of `waterfill`, at which the finished file meets a budget.

What a level costs is known before anything is rounded, to a few percent: from how the weights deviate and from the
moments of their inputs (methods/waterfill.py). From there a few models are made and written; each tells how far the
next must go, for bytes fall evenly with the logarithm of the level (bisection keeps the steps in bounds).

Where few bits are left, the first model also tells what each site really costs, and its level is corrected
(correct.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibration.plan import survey
from tersor.calibration.walk import SiteObserver, walk
from tersor.checkpoint.container_write import size_of, write
from tersor.checkpoint.layout import CODED, other_tensors
from tersor.core.errors import BudgetError
from tersor.core.progress import Events, Progress, silent
from tersor.core.scratch import scratch_folder
from tersor.methods.solver import pose
from tersor.methods.stats import Stats
from tersor.methods.waterfill import STEPS_DAMPING, Waterfill, bits_at, damping_of, deviations, row_curvature
from tersor.nn.sites import Site, escape, find_sites
from tersor.pipeline import Compressed, run
from tersor.recipe import Recipe
from tersor.search.correct import measured_factors
from tersor.search.limit import Limit
from tersor.search.trials import NUM_TRIALS, Trial, Trials
from tersor.steps.weights import WeightsStep
from tersor.tasks.contract import Task

AIM = 0.9975  # of the limit
NEAR = 0.995  # of the limit, from where on a file is as good as it gets
NUM_MODELS = 8  # made at most; two or three do but for the smallest files
MOST_BITS, FEWEST_BITS = 13.0, 0.02  # bits a weight, between which levels are sought
FEW_BITS = 3.0  # a weight, below which the loss is no longer what its curvature says
MOST_SITES = 64  # whose loss is measured one by one
WIDEST = 8.0  # bits a weight, where the search for a drop begins


@dataclass(frozen=True)
class Forecast:
    """Prediction of file size by noise level, before any model is made.

    Attributes:
        counts: histogram of the codes' deviations at level 1 over all sites, as `deviations` counts them.
        num_states: states of the trellis.
    """

    counts: Tensor
    num_states: int = 0

    @property
    def num_weights(self) -> float:
        return self.counts.sum().item()

    def num_bytes(self, level: float) -> float:
        """Bytes that the entropy-coded weights of the whole model take."""
        return bits_at(self.counts, level, self.num_states) / 8

    def level(self, num_bytes: float) -> float:
        """The level at which the codes take so many bytes, by bisection."""
        low, high = -100.0, 100.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if self.num_bytes(2**middle) > num_bytes else (low, middle)
        return 2**high

    def level_of(self, bits: float) -> float:
        """The level at which a weight takes so many bits."""
        return self.level(self.num_weights * bits / 8)


@dataclass(frozen=True)
class LevelFound:
    """A noise level, and the model and file size that it gives."""

    recipe: Recipe
    made: Compressed
    num_bytes: int


@dataclass(frozen=True)
class NoiseLevelSearch:
    """The search for the coarsest level that a budget allows.

    Attributes:
        step: its rules and excludes fix their sites.
        stats: the curvature of the loss at every site.
        factors: factors of the level, by site.
        num_states: states of the trellis, 0 for none.
    """

    model: nn.Module
    task: Task | None
    step: WeightsStep
    stats: Mapping[str, Stats]
    seed: int = 0
    progress: Progress = silent
    factors: Mapping[str, float] = field(default_factory=dict)
    num_states: int = 0

    def make(self, level: float) -> LevelFound:
        """The model of one level, and the exact bytes of its file."""
        made = self.compressed(recipe_at(level, self.step, self.seed, self.factors, self.num_states))
        return LevelFound(made.recipe, made, size_of(made.model))

    def compressed(self, recipe: Recipe) -> Compressed:
        """The model of a recipe."""
        return run(recipe, self.model, self.task, stats=self.stats, events=Events(self.progress))

    def within(self, limit: Limit) -> LevelFound:
        """The largest file that the limit allows, or one less than half a percent smaller. Raises BudgetError naming
        the nearest file where there is none."""
        searching, forecast = self, self.foresee()
        level = forecast.level(AIM * limit.num_bytes)
        if forecast.num_bytes(level) < FEW_BITS * forecast.num_weights / 8 and self.can_measure():
            searching, forecast = self.corrected(level)
        return fit(limit, forecast, searching.make)

    def can_measure(self) -> bool:
        """True if the loss of every site by itself can be measured in reasonable time."""
        return self.task is not None and not self.factors and len(find_sites(self.model)) <= MOST_SITES

    def corrected(self, level: float) -> "tuple[NoiseLevelSearch, Forecast]":
        """The same search with a level for each site, corrected by what it costs at `level`, and its forecast."""
        assert self.task is not None
        self.progress("measuring what sites cost", 0, 1)
        found = self.make(level)
        levels = {site.name: scheme.method.level for site, scheme in self.coded_sites(level)}
        factors = measured_factors(self.model, found.made.model, levels, self.task)
        self.progress("measuring what sites cost", 1, 1)
        searching = replace(self, factors=factors)
        return searching, searching.foresee()

    def coded_sites(self, level: float) -> list[tuple[Site, Any]]:
        """The sites that the level decides, with their schemes."""
        assigned = (
            recipe_at(level, self.step, self.seed, self.factors, self.num_states)
            .weights[0]
            .assign(find_sites(self.model))
        )
        return [(site, scheme) for site, scheme in assigned if scheme and isinstance(scheme.method, Waterfill)]

    def defended(self, trials: Trials) -> None:
        """Run trials; the smallest file that is within is the answer."""
        searching, forecast = self, self.foresee()
        if self.can_measure():
            searching, forecast = self.corrected(forecast.level_of(FEW_BITS))

        def judged(level: float) -> Trial:
            recipe = recipe_at(level, searching.step, searching.seed, searching.factors, searching.num_states)
            return trials.run(recipe)

        defend(forecast, judged)

    def foresee(self) -> Forecast:
        """Forecast the deviations of the codes at all sites that the level decides, by one walk over the model."""
        schemes = dict(self.coded_sites(1.0))
        sites = list(schemes)
        counts: list[Tensor] = []

        def look(site: Site, moments: Stats) -> None:
            self.progress("measuring what levels cost", len(counts), len(sites))
            known, weight = self.stats.get(site.name, Stats()), site.matrix(self.model)
            found = replace(moments, row_weight=known.row_weight, column_weight=known.column_weight)
            problem = pose(weight, found, damping_of(weight, found, STEPS_DAMPING), upstream_correction=0.0)
            rows = row_curvature(weight, problem, found).rsqrt() * schemes[site].method.level
            counts.append(deviations(problem, rows))

        if self.task is None:
            for site in sites:
                look(site, Stats())
        else:
            walk(survey(self.model, self.task, sites), SiteObserver(frozenset({"second_moment"}), look), seed=self.seed)
        self.progress("measuring what levels cost", len(sites), len(sites))
        total = torch.stack(counts).sum(0) if counts else torch.zeros(1, dtype=torch.float64)
        return Forecast(total, self.num_states)


def check_codable(model: nn.Module, step: WeightsStep, limit: Limit) -> None:
    """Before anything is measured: raises BudgetError where already what is not coded takes more than the limit."""
    assigned = recipe_at(1.0, step, 0).weights[0].assign(find_sites(model))
    kept = other_tensors(model, [site for site, scheme in assigned if scheme])
    with scratch_folder() as folder:
        write({name: tensor.detach() for name, tensor in kept.items()}, folder / CODED)
        num_bytes = (folder / CODED).stat().st_size
    if num_bytes > limit.num_bytes:
        raise BudgetError(
            f"{limit.text} ({limit.num_bytes:,} bytes) is below what is kept as it is: biases, norms and excluded sites"
            f" take {num_bytes:,} bytes; ask for more"
        )


def recipe_at(
    level: float, step: WeightsStep, seed: int, factors: Mapping[str, float] = {}, num_states: int = 0
) -> Recipe:
    """One level, times its factor for each site that has one, for all sites that no rule fixes; five digits, so that
    the recipe says exactly what was done."""

    def scheme(level: float) -> str:
        return f"waterfill(level={level:.5g}{f', num_states={num_states}' if num_states else ''}):coded"

    own = {escape(name): scheme(level * factor) for name, factor in factors.items()}
    return Recipe.of(scheme(level), {**own, **step.rules}, step.exclude, seed)


Make = Callable[[float], LevelFound]


def fit(limit: Limit, forecast: Forecast, make: Make) -> LevelFound:
    """The largest file that the limit allows, or one less than half a percent smaller.

    Raises BudgetError where the coarsest level is still too large.
    """
    finest, coarsest = forecast.level_of(MOST_BITS), forecast.level_of(FEWEST_BITS)
    level = min(max(forecast.level(AIM * limit.num_bytes), finest), coarsest)
    best: LevelFound | None = None
    over, under = finest, coarsest  # the levels between which the answer lies
    measured: list[tuple[float, int]] = []
    for _ in range(NUM_MODELS):
        found = make(level)
        measured.append((level, found.num_bytes))
        if found.num_bytes <= limit.num_bytes:
            under = level
            if best is None or found.num_bytes > best.num_bytes:
                best = found
            if found.num_bytes >= NEAR * limit.num_bytes or level <= finest:
                break
        elif level >= coarsest:
            raise BudgetError(why_too_small(limit, found.num_bytes))
        else:
            over = level
        proposed = min(max(next_level(measured, AIM * limit.num_bytes, forecast), finest), coarsest)
        tried = {each for each, _ in measured}
        level = (over * under) ** 0.5 if proposed in tried or not over <= proposed <= under else proposed
    if best is None:
        raise BudgetError(why_too_small(limit, min(num_bytes for _, num_bytes in measured)))
    return best


def next_level(measured: list[tuple[float, int]], num_bytes: float, forecast: Forecast) -> float:
    """The level to try next: from the nearest file along the forecast, or along the line through the nearest two."""
    nearest = sorted(measured, key=lambda point: abs(point[1] - num_bytes))
    level, have = nearest[0]
    slope = (forecast.num_bytes(level * 1.05) - forecast.num_bytes(level / 1.05)) / (2 * log2(1.05))
    if len(nearest) > 1 and nearest[1][0] != level and nearest[1][1] != have:
        slope = (nearest[1][1] - have) / log2(nearest[1][0] / level)
    steps = (num_bytes - have) / min(slope, -1e-9 * forecast.num_weights)
    return float(level * 2 ** max(-3.0, min(3.0, steps)))


def why_too_small(limit: Limit, num_bytes: int) -> str:
    """The message of a limit that no level meets."""
    return (
        f"{limit.text} ({limit.num_bytes:,} bytes) is below what coded weights reach: the nearest file is "
        f"{num_bytes:,} bytes, --size {-(-num_bytes // 1000)}KB. What is not coded is kept as it is; rules and "
        f"excludes count there, too"
    )


def defend(forecast: Forecast, judged: Callable[[float], Trial]) -> None:
    """Bisect the logarithm of the level: the smallest file whose verdict is `within`."""
    fine, coarse = forecast.level_of(WIDEST), forecast.level_of(FEWEST_BITS)
    level = forecast.level_of(2.5)
    for number in range(NUM_TRIALS):
        if judged(level).verdict.outcome == "within":
            fine = level
        else:
            coarse = level
        following = (fine * coarse) ** 0.5
        if number < 2:  # at first an octave at a time: the ends are far away
            following = min(level * 2, following) if fine == level else max(level / 2, following)
        if abs(log2(following / level)) < 0.01:
            break
        level = following
