"""The one loop: every step of the recipe over every site it names."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.activations import ACTIVATIONS, Activation, IntStatic
from tersor.assignment import Assignment
from tersor.calibrate import gather
from tersor.core.progress import Progress, silent
from tersor.errors import FormatError, ModelError, TersorError
from tersor.formats.contract import Encoded, Sparse
from tersor.keep_float import KeptFloat, choose, predicted_loss, spared
from tersor.methods.contract import BlockMethod
from tersor.moments import has_inputs, shows_inputs
from tersor.preflight import preflight, preflight_all
from tersor.pretrained import guard
from tersor.recipe import Recipe, Step, TransformStep, WeightsStep
from tersor.schemes import Scheme
from tersor.site_report import SiteReport
from tersor.sites import Site, find_sites, packed_weight
from tersor.stats import Stats
from tersor.stream import BlockRun, find_blocks, part_of
from tersor.tasks.contract import Task
from tersor.training import Curve, Job, StudentStep, TrainingStep
from tersor.training.journal import Journal
from tersor.transforms.bias_correction import corrected_bias
from tersor.transforms.contract import Transform
from tersor.walk import Around, Chosen, Walk


@dataclass(frozen=True)
class Compressed:
    """A compressed model, the recipe that made it, and what became of each site; `kept_float` is what steps with
    `keep_float` left out, and why."""

    model: nn.Module
    recipe: Recipe
    sites: list[SiteReport]
    curves: list[Curve] = field(default_factory=list)
    kept_float: list[KeptFloat] = field(default_factory=list)


def compress(
    model: nn.Module,
    recipe: Recipe | str,
    task: Task | None = None,
    *,
    stats: Mapping[str, Stats] | None = None,
    journal: Path | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Compress a copy of `model` as the recipe says; the model itself is left as it was.

    Args:
        recipe: or the scheme for every site alone: `"int4-g64"`.
        task: gives calibration data to the methods that ask for statistics; without it they do without. Schemes that
            name no method get the best that the data allows, and the recipe of the result says which.
        stats: statistics already gathered for this model and task.
        journal: folder for the checkpoints of steps that train; a run that was killed goes on from there.
        progress: called with what is done, how many sites are done, and of how many.

    Raises:
        FormatError: a scheme does not fit a site's shape (before any work starts).
        ModelError: a weight is not finite.
    """
    recipe = Recipe.of(recipe) if isinstance(recipe, str) else recipe
    preflight_all(model, recipe)
    job = Job(copy_but_sites(model), model, task, recipe.seed, progress)
    choices: list[KeptFloat] = []
    done: list[Step] = []
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Assignment):
            step = step.with_methods(find_sites(job.model), partial(sees_inputs, job, step))
        done.append(step)
        if isinstance(step, TransformStep):
            apply_transform(job.model, recipe.transform_of(number), task, seed=recipe.seed, progress=progress)
            stats = None  # they described the model before
        elif isinstance(step, StudentStep):
            step.run(job)
            stats = None
        elif isinstance(step, TrainingStep):
            own_shared_weights(job.model, model)
            key = key_of(model, recipe, number, task)
            job.journal = Journal(journal / f"step-{number}.safetensors", key) if journal else None
            step.run(job)
            stats = None
        else:
            if step.keep_float not in ("none", 0):
                choices.append(choose(job.model, step, task, stats or {}, recipe.seed, progress))
                step = spared(step, choices[-1])
            weights = WeightsRun(job.model, step, task, stats, recipe.seed, progress)
            weights.run()
            job.reports |= weights.reports
            check_masks(job, job.reports)
    own_shared_weights(job.model, model)
    guard(job.model)
    recipe = recipe.model_copy(update={"steps": tuple(done)})
    return Compressed(job.model, recipe, list(job.reports.values()), job.curves, choices)


def sees_inputs(job: Job, step: Assignment, site: Site) -> bool:
    """Whether the usual methods of a step are those that read what a site is multiplied with. QAT begins with weights
    that were only rounded; and where weights are zero on purpose, what makes up for errors would fill them again."""
    if job.task is None or not isinstance(step, WeightsStep) or site.name in job.masks.masks:
        return False
    packed = packed_weight(job.model.get_submodule(site.places[0].module), site.places[0].parameter)
    return shows_inputs(job.model, site) and not (packed and isinstance(packed.format, Sparse))


def key_of(model: nn.Module, recipe: Recipe, number: int, task: Task | None) -> str:
    """What the checkpoints of a recipe's step depend on, as a hash: not on the steps that come after it."""
    steps = [
        recipe.transform_of(place) if isinstance(step, TransformStep) else step
        for place, step in enumerate(recipe.steps[: number + 1])
    ]
    sums = [f"{name} {parameter.detach().double().sum().item()}" for name, parameter in model.named_parameters()]
    data = [task.fingerprint, task.description] if task else []
    return hashlib.sha256("\0".join([str(recipe.seed), *map(repr, steps), *data, *sums]).encode()).hexdigest()


def check_masks(job: Job, reports: Mapping[str, SiteReport]) -> None:
    """Raises FormatError where a method gave weights back that a pruning step had taken."""
    for site in find_sites(job.model):
        mask = job.masks.masks.get(site.name)
        if mask is not None and site.matrix(job.model)[~mask].any():
            scheme = reports[site.name].scheme if site.name in reports else "a step"
            raise FormatError(
                f"{site.name}: {scheme} fills weights that an earlier step pruned; use a method that leaves zeros as "
                f"they are (mse, nearest, or kept for formats with a mask), or exclude it with --exclude '{site.name}'"
            )


def apply_transform(
    model: nn.Module, transform: Transform, task: Task | None, *, seed: int = 0, progress: Progress = silent
) -> None:
    """Rewrite the model in place, with the statistics that the transform reads."""
    stats: dict[str, Stats] = {}
    if task is not None and transform.needs:
        sites = find_sites(model)

        def note(site: Site, found: Stats) -> None:
            progress(f"measuring inputs for {transform.name}", len(stats), len(sites))
            stats[site.name] = found

        Walk(model, model, task, sites, note, transform.needs, seed=seed).run()
        progress(f"measuring inputs for {transform.name}", len(sites), len(sites))
    transform.apply(model, stats)


class WeightsRun:
    """One weights step over a model, which is changed in place.

    Attributes:
        original: what runs beside the model where a method asks for it; None: a copy is made then. Where it is given,
            the model never lies in memory whole, and the curvature of its loss is not gathered.
        around: entered around the work on each part of the model (see walk.py).
        reports: what became of each site, by name, in the order of the model.
        predicted: where it is not None, nothing is changed: the loss of each site (keep_float.py) is put here, and what
            it would get into `made`.
    """

    def __init__(
        self,
        model: nn.Module,
        step: WeightsStep,
        task: Task | None,
        stats: Mapping[str, Stats] | None,
        seed: int,
        progress: Progress,
        original: nn.Module | None = None,
        around: Around = nullcontext,
    ):
        self.original, self.around = original, around
        self.model, self.task, self.stats, self.seed, self.progress = model, task, stats or {}, seed, progress
        self.corrects_biases = step.bias_correction
        self.work = {site: scheme for site, scheme in step.assign(find_sites(model)) if scheme is not None}
        self.weights: dict[Site, Tensor] = {}  # as they were, of the sites whose method tunes whole blocks
        self.reports: dict[str, SiteReport] = {}
        self.predicted: dict[str, float] | None = None
        self.made: dict[Site, tuple[Encoded, Activation | None]] = {}
        preflight(list(self.work.items()))

    def run(self) -> None:
        needs = needs_of(self.model, self.work)
        if self.corrects_biases:
            needs |= {"mean"}
        if self.predicted is not None:
            needs |= {"row_weight", "column_weight", "sample"}
        if self.task is not None and not self.stats and needs & CURVATURE and self.original is None:
            self.stats = gather(self.model, self.task, seed=self.seed, progress=self.progress)
        if self.task is not None and needs - CURVATURE:
            original = self.original
            if original is None:
                original = copy_but_sites(self.model) if "cross_moment" in needs else self.model
            walk = Walk(self.model, original, self.task, list(self.work), self.visit, needs - CURVATURE, self.refine)
            walk.seed, walk.around = self.seed, self.around
            walk.run()
        else:
            block_names = find_blocks(self.model)
            for part, sites in groupby(self.work, lambda site: part_of(block_names, site.parameter)):
                with self.around(part):
                    for site in sites:
                        chosen = self.visit(site, Stats())
                        if chosen is not None:
                            site.replace(self.model, chosen.encoded, chosen.activation)
        self.progress("compressing", len(self.work), len(self.work))
        self.reports = {site.name: self.reports[site.name] for site in self.work}

    def visit(self, site: Site, moments: Stats) -> Chosen | None:
        """Choose what stands in a site's place; None: it stays."""
        self.progress("compressing", len(self.reports), len(self.work))
        known, scheme = self.stats.get(site.name, Stats()), self.work[site]
        stats = replace(moments, row_weight=known.row_weight, column_weight=known.column_weight)
        weight = site.matrix(self.model)
        if isinstance(scheme.method, BlockMethod):
            self.weights[site] = weight
        encoded = compress_site(site, weight, scheme, stats)
        activation = None
        if scheme.activation and site.takes_activation(self.model, scheme.activation):
            with named(site):
                activation = Activation(scheme.activation, fitted(scheme, stats))
        self.report(site, encoded, weight, activation)
        if self.predicted is not None:
            self.predicted[site.name] = predicted_loss(weight, encoded, activation, stats)
            self.made[site] = encoded, activation
            return None
        return Chosen(encoded, activation, self.new_bias(site, encoded, weight, stats))

    def new_bias(self, site: Site, encoded: Encoded, weight: Tensor, stats: Stats) -> nn.Parameter | None:
        """The bias that takes back what the new weight does to the mean output; None: it stays."""
        repairs = "cross_moment" in self.work[site].method.needs
        if not self.corrects_biases or stats.mean is None or repairs or len(site.places) > 1:
            return None
        bias = self.model.get_submodule(site.places[0].module).bias
        if not isinstance(bias, nn.Parameter):
            return None
        with named(site):
            corrected = corrected_bias(bias.detach(), encoded.decode() - weight, stats.mean)
        return nn.Parameter(corrected, requires_grad=bias.requires_grad)

    def refine(self, run: BlockRun, chosen: dict[Site, Chosen]) -> dict[Site, Chosen]:
        """Let the methods that tune whole blocks choose again, each all its sites at once."""
        better: dict[Site, Chosen] = {}
        for method in {scheme.method: None for site in chosen if (scheme := self.work[site])}:
            if isinstance(method, BlockMethod):
                sites = {site.name: site for site in chosen if self.work[site].method == method}
                weights = {name: self.weights.pop(site) for name, site in sites.items()}
                tuned = method.tune(weights, {name: chosen[site].encoded for name, site in sites.items()}, run)
                for name, site in sites.items():
                    better[site] = chosen[site]._replace(encoded=tuned[name])
                    self.report(site, tuned[name], weights[name], chosen[site].activation)
        return better

    def report(self, site: Site, encoded: Encoded, weight: Tensor, activation: Activation | None) -> None:
        self.reports[site.name] = SiteReport.of(site, self.work[site], encoded, activation, weight)


CURVATURE = frozenset({"row_weight", "column_weight"})


def needs_of(model: nn.Module, work: Mapping[Site, Scheme]) -> frozenset[str]:
    """The statistics that the scheme of any site reads."""
    needs: frozenset[str] = frozenset()
    for site, scheme in work.items():
        read = scheme.method.needs
        if "second_moment" in read and has_inputs(model, site):
            read -= {"column_weight"}  # which only stands in for it
        needs |= read | input_needs(scheme)
    return needs


def input_needs(scheme: Scheme) -> frozenset[str]:
    """The statistics that quantizing a site's input takes."""
    if scheme.observer is not None:
        return scheme.observer.needs
    return ACTIVATIONS[scheme.activation].needs if scheme.activation else frozenset()


def fitted(scheme: Scheme, stats: Stats) -> dict[str, Tensor]:
    """The static parameters of a site's input."""
    assert scheme.activation is not None
    format = ACTIVATIONS[scheme.activation]
    return format.fit(stats, scheme.observer) if isinstance(format, IntStatic) else format.fit(stats)


def compress_site(site: Site, weight: Tensor, scheme: Scheme, stats: Stats) -> Encoded:
    """One site's weight in its format. Raises what its method raises, naming the site and the way out."""
    check_finite(site, weight)
    with named(site):
        encoded = scheme.method.compress(weight, scheme.format, stats)
    if weight.any() and not encoded.decode().any():
        raise FormatError(
            f"{site.name}: {scheme} turns every weight to zero (the largest is {weight.abs().max().item():.2g}, too "
            f"small for fp16 scales or values); use bf16, or exclude it with --exclude '{site.name}'"
        )
    return encoded


@contextmanager
def named(site: Site) -> Iterator[None]:
    """Have what goes wrong inside name the site and the way out."""
    try:
        yield
    except TersorError as problem:
        raise type(problem)(f"{site.name}: {problem}; or exclude it with --exclude '{site.name}'") from None


def check_finite(site: Site, weight: torch.Tensor) -> None:
    """Raises ModelError if a weight is NaN or infinite."""
    num_bad = int((~torch.isfinite(weight)).sum())
    if num_bad:
        raise ModelError(
            f"{site.name}: {num_bad} of {weight.numel()} weights are NaN or infinite; retrain or repair it"
        )


def copy_but_sites(model: nn.Module) -> nn.Module:
    """A deep copy that shares the site weights, which are replaced and never written to."""
    weights = [site.weight(model) for site in find_sites(model)]
    return copy.deepcopy(model, {id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)})


def own_shared_weights(model: nn.Module, original: nn.Module) -> None:
    """Copy the site weights that were kept, so that casting or training `model` leaves the original alone."""
    shared = {id(parameter) for parameter in original.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in shared:
                setattr(module, name, copies.setdefault(id(parameter), copy.deepcopy(parameter)))
