"""The one loop: every step of the recipe over every site it names."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from tersor.calibration.inputs import before_sites
from tersor.calibration.moments import shows_inputs
from tersor.calibration.plan import survey
from tersor.calibration.walk import SiteObserver, walk
from tersor.checkpoint.artifact import save_into
from tersor.core.errors import FormatError
from tersor.core.progress import Events, Progress, silent
from tersor.methods.stats import Stats
from tersor.nn.copies import copy_but_sites, own_shared_weights
from tersor.nn.packed import packed_weight
from tersor.nn.pretrained import guard
from tersor.nn.sites import Site, check_finite, find_sites
from tersor.recipe import Recipe, Step, TransformStep
from tersor.schemes.assignment import Assignment
from tersor.steps.keep_float import KeptFloat, choose, spared
from tersor.steps.loss_predictor import LossPredictor
from tersor.steps.preview import Preview, refilled
from tersor.steps.site_report import SiteReport
from tersor.steps.step_visitor import Calibration
from tersor.steps.weights import WeightsStep, check_number, check_task
from tersor.steps.weights_run import WeightsRun
from tersor.tasks.contract import Task
from tersor.tasks.inputs import scoring
from tersor.training import Curve, Job, StudentStep, TrainingStep
from tersor.training.journal import Journal
from tersor.transforms.contract import Transform
from tersor.transforms.unchanged import apply_unchanged

EXAMPLES = 2  # that a model is run on before and after a transform


@dataclass(frozen=True)
class Compressed:
    """A compressed model, the recipe that made it, and what became of each site; `kept_float` is what steps with
    `keep_float` left out, and why; `notes` are what else the user should know."""

    model: nn.Module
    recipe: Recipe
    sites: list[SiteReport]
    curves: list[Curve] = field(default_factory=list)
    kept_float: list[KeptFloat] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(
    recipe: Recipe | str,
    model: nn.Module,
    task: Task | None = None,
    *,
    stats: Mapping[str, Stats] | None = None,
    journal: Path | None = None,
    events: Events = Events(),
) -> Compressed:
    """Do what a recipe says to a copy of `model`; the model itself is left as it was.

    Args:
        recipe: or the scheme for every site alone: `"int4-g64"`.
        task: gives calibration data to the methods that ask for statistics; without it they do without. Schemes that
            name no method get the best that the data allows, and the recipe of the result says which.
        stats: statistics already gathered for this model and task.
        journal: folder for the checkpoints of steps that train; a run that was killed goes on from there.
        events: `on_progress` and `on_step` are called.
    Raises what `check_steps` raises, before any work, and ModelError for a weight that is not finite.
    """
    recipe, progress = Recipe.of(recipe) if isinstance(recipe, str) else recipe, events.on_progress
    check_steps(recipe, model, task)
    for site in find_sites(model) if task is not None else ():
        check_finite(site, site.matrix(model))
    notes: dict[str, str] = {}
    job = Job(copy_but_sites(model), model, task, recipe.seed, progress)
    choices: list[KeptFloat] = []
    done: list[Step] = []
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Assignment):
            materialize_assigned(job.model, step)
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
                choices.append(float_sites(job, step, stats))
                step = spared(step, choices[-1])
            weights = WeightsRun(job.model, step, Calibration(task, stats or {}, recipe.seed, progress))
            weights.run()
            job.reports |= weights.reports
            notes |= weights.notes
            check_masks(job, job.reports)
        events.on_step(number + 1, len(recipe.steps))
    own_shared_weights(job.model, model)
    guard(job.model, save_into)
    recipe = recipe.model_copy(update={"steps": tuple(done)})
    return Compressed(job.model, recipe, list(job.reports.values()), job.curves, choices, list(notes.values()))


def materialize_assigned(model: nn.Module, step: Assignment) -> None:
    """Have the weights that a step is to compress be parameters, where their modules compute them from others."""
    for site, scheme in step.assign(find_sites(model)):
        if scheme is not None:
            site.materialize(model)


def sees_inputs(job: Job, step: Assignment, site: Site) -> bool:
    """True if a step uses the default methods that read a layer's inputs.

    QAT begins with weights that were only rounded. Pruned weights would be filled again by error compensation.
    """
    if job.task is None or not isinstance(step, WeightsStep) or site.name in job.masks.masks:
        return False
    packed = packed_weight(job.model.get_submodule(site.owners[0].module), site.owners[0].parameter)
    return shows_inputs(job.model, site) and not (packed and packed.format.sparse)


def float_sites(job: Job, step: WeightsStep, stats: Mapping[str, Stats] | None) -> KeptFloat:
    """The sites that `step.keep_float` keeps, by what a run of `step` over a copy of the model predicts.

    Raises InputError without calibration data, or where more sites are to be kept than there are.
    """
    task = check_task(step.keep_float, job.task)
    predictor = LossPredictor(copy_but_sites(job.model), step, Calibration(task, stats or {}, job.seed, job.progress))
    check_number(step.keep_float, len(predictor.schemes))
    predictor.run()
    schemes = {site.name: scheme for site, scheme in predictor.schemes.items()}
    return choose(job.model, step.keep_float, task, schemes, predictor.packed, predictor.predicted, job.progress)


def key_of(model: nn.Module, recipe: Recipe, number: int, task: Task | None) -> str:
    """A hash of all that the checkpoints of a recipe's step depend on: not of the steps that come after it."""
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
            raise FormatError(refilled(site, scheme))


def apply_transform(
    model: nn.Module, transform: Transform, task: Task | None, *, seed: int = 0, progress: Progress = silent
) -> None:
    """Rewrite the model in place, with the statistics that the transform reads.

    Raises ModelError, with the model as it was, if it computes something else on calibration inputs afterwards.
    """
    stats: dict[str, Stats] = {}
    if task is not None and transform.needs:
        sites = find_sites(model)

        def note(site: Site, found: Stats) -> None:
            progress(f"measuring inputs for {transform.name}", len(stats), len(sites))
            stats[site.name] = found

        walk(survey(model, task, sites), SiteObserver(transform.needs, note), seed=seed)
        progress(f"measuring inputs for {transform.name}", len(sites), len(sites))
    if task is None:
        transform.apply(model, stats)
        return
    batch = next(iter(task.batches("calibration", batch_size=EXAMPLES)))

    def outputs() -> Tensor:
        with scoring(model):
            return task.forward(model, batch)

    def note_axes(site: Site, module: nn.Module, x: Tensor) -> Tensor:
        stats[site.name] = replace(stats.get(site.name, Stats()), num_axes=x.ndim)
        return x

    with before_sites(model, find_sites(model), note_axes):
        outputs()
    apply_unchanged(model, transform.name, lambda: transform.apply(model, stats), outputs)


def check_steps(recipe: Recipe | None, model: nn.Module, task: Task | None = None, *, is_whole: bool = True) -> None:
    """Before any work: every step of a recipe can do what it says to what the steps before it will have made.

    Args:
        is_whole: False where the task is not opened yet, and all else is checked.

    Raises UnknownName for a pattern without a site, FormatError for a scheme that does not fit, DataError for a task
    that cannot be trained on, and what else the steps' `check` raise.
    """
    preview = Preview(model, task, is_whole)
    for step in recipe.steps if recipe else ():
        step.check(preview)
