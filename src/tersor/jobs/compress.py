"""The whole job of `tersor compress`: open, measure, choose, compress, write, load back, measure again, judge.

What is measured is what was written: the artifact is loaded from its temporary folder before it is scored, and the
folder appears under its own name only when everything went well.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.calibration.curvature import estimate_fisher
from tersor.checkpoint.artifact import fill, load
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.layout import tensors_of
from tersor.checkpoint.manifest import read_manifest, weights_path
from tersor.checkpoint.open import open_model
from tersor.checkpoint.output import atomic_folder, check_output
from tersor.checkpoint.seal import MANIFEST, as_text, entry_of, listing
from tersor.checkpoint.side_files import left_behind
from tersor.checkpoint.source import Source, call_factory
from tersor.core.errors import BudgetError, InputError
from tersor.core.progress import Progress, silent
from tersor.jobs.task_choice import TaskChoice, open_task_for
from tersor.measure.latency import TimeLimit
from tersor.measure.scorecard import Scorecard, Subject, machine, measure
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.methods.stats import Stats
from tersor.nn.sites import check_has_sites
from tersor.pipeline import SiteReport, compress, preflight_all
from tersor.recipe import Recipe
from tersor.report.card import model_card
from tersor.schemes.scheme import KEEP, parse_rule
from tersor.search.choices import Budget, check_choices
from tersor.search.drop import search_drop
from tersor.search.limit import Limit
from tersor.search.noise_level import NoiseLevelSearch, check_codable
from tersor.search.plan import CANDIDATES, check_reachable, measure_menus, plan_and_make
from tersor.search.trials import ALPHA, Trial, TrialJournal, Trials, nearest_points, smallest_within
from tersor.tasks.contract import Task
from tersor.tasks.progress import score
from tersor.training.journal import journal_for
from tersor.training.loop import check_trainable


@dataclass(frozen=True)
class Outcome:
    """The folder that `tersor compress` made, its measurements and its verdict."""

    output: Path
    recipe: Recipe
    sites: list[SiteReport]
    scorecards: list[Scorecard]
    verdict: Verdict
    limit: Limit | None
    trials: list[Trial]
    task: str
    manifest: dict[str, Any]


DEFAULT_DROP = "1%"


def compress_to_folder(
    model: str,
    output: Path,
    *,
    weights: Path | None = None,
    task_choice: TaskChoice = TaskChoice(),
    budget: Budget = Budget(),
    recipe: Recipe | None = None,
    formats: Sequence[str] = (),
    rules: dict[str, str] | None = None,
    exclude: Sequence[str] = (),
    transforms: Sequence[str] = (),
    bias_correction: bool = False,
    keep_float: str | int = "none",
    seed: int = 0,
    batch_sizes: Sequence[int] | None = None,
    num_threads: int = 1,
    timing_seconds: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Outcome:
    """Make `output` from `model`. Raises a TersorError with the way out, and then leaves nothing behind.

    Args:
        timing_seconds: that timing may take; None is as long as all else took, and a minute at most.
    """
    began = time.perf_counter()
    check_output(output, overwrite)
    tolerance = Tolerance.parse(budget.drop or DEFAULT_DROP)
    given = check_choices(budget, recipe, formats, rules, exclude, transforms, seed, bias_correction, keep_float)
    torch.manual_seed(seed)
    progress("opening the model", 0, 1)
    source = open_model(model, weights=weights, dtype=dtype)
    check_has_sites(source.model)
    if source.kind == "artifact":
        raise InputError(f"{model} is a tersor artifact already; compress the original model instead")
    progress("opening the model", 1, 1)
    original_bytes = source.num_bytes or size_of(source.model)
    num_parameters = sum(parameter.numel() for parameter in source.model.parameters())
    limit = Limit.of(
        original_bytes=original_bytes,
        num_parameters=num_parameters,
        size=budget.size,
        ratio=budget.ratio,
        bits=budget.bits,
    )
    step = Recipe.of(KEEP, rules, exclude).weights[0]
    preflight_all(source.model, recipe or given)
    if recipe is None and given is None and not budget.coded:
        check_reachable(source.model, step, formats or CANDIDATES, limit)
    if budget.coded and limit is not None:
        check_codable(source.model, step, limit)
    task = open_task_for(source, task_choice)
    if recipe is not None and recipe.trains:
        check_trainable(task, "the recipe")
    task.prepare(source.model)
    original = score(task, source.model, progress, "evaluating the original")
    stats: dict[str, Stats] = {}
    trials: list[Trial] = []
    recipe, made, kept = recipe or given, None, None
    if recipe is None:
        stats = estimate_fisher(source.model, task, seed=seed, progress=progress)
        menus = [] if budget.coded else measure_menus(source.model, stats, step, formats or CANDIDATES, progress)
        searching = NoiseLevelSearch(source.model, task, step, stats, seed, progress, num_states=budget.trellis)
        if limit is None:
            asked = [repr((budget, formats, step, dtype)), *source.hashes.values(), *sums_of(source.model)]
            kept = TrialJournal(output.with_name(f".{output.name}.trials"), [*asked, *identity(task, seed)])
            search = Trials(task, original, tolerance, seed, progress, on_trial, kept)
            with told(search):
                if budget.coded:
                    searching.defended(search)
                else:
                    search_drop(source.model, menus, stats, search)
            trials, made = search.finished, search.best
            try:
                recipe = defensible(trials, tolerance).recipe
            except BudgetError:
                kept.remove()
                raise
        elif budget.coded:
            made = searching.within(limit).made
        else:
            made = plan_and_make(source.model, menus, limit, searching.compressed, seed)
    recipe = made.recipe if made else recipe
    assert recipe is not None
    with journal_for(output, recipe.trains) as journal:
        made = made or compress(source.model, recipe, task, stats=stats, journal=journal, progress=progress)
        recipe = made.recipe
        with atomic_folder(output, overwrite) as folder:
            fill(made.model, folder, source=source.folder, manifest=about(source))
            loaded = load(folder, model=call_factory(source.architecture) if source.kind == "custom" else None)
            known = smallest_within(trials)
            if known is not None and known.scores is not None and same_tensors(made.model, loaded):
                scores = known.scores  # the file holds what the trial measured
            else:
                scores = score(task, loaded, progress, "evaluating the compressed model")
            file_bytes = weights_path(folder, read_manifest(folder)).stat().st_size
            if limit is not None and not given and file_bytes > limit.num_bytes:
                raise BudgetError(f"{limit.text} is {limit.num_bytes:,} bytes, and the file came out at {file_bytes:,}")
            subjects = [
                Subject("original", source.model, original_bytes),
                Subject("compressed", loaded, file_bytes),
            ]
            cards = measure(
                subjects,
                [original, scores],
                task,
                batch_sizes=batch_sizes,
                num_threads=num_threads,
                limit=TimeLimit(timing_seconds, time.perf_counter() - began),
                progress=progress,
            )
            # After a search the chosen trial is held to the search's stricter level, on the scores of the loaded file.
            verdict = judge(original, scores, tolerance, trials[0].verdict.alpha if trials else ALPHA, seed)
            manifest = read_manifest(folder) | {
                "source": {"name": source.title, "hashes": source.hashes, "bytes": original_bytes},
                "task": {"name": task.name, "description": task.description, "fingerprint": task.fingerprint},
                "recipe": recipe.model_dump(mode="json"),
                "seed": seed,
                "limit": {"text": limit.text, "bytes": limit.num_bytes} if limit else None,
                "site_reports": [report.to_dict() for report in made.sites],
                "verdict": verdict.to_dict(),
                "trials": [{"bytes": t.num_bytes, "score": t.score, "verdict": t.verdict.to_dict()} for t in trials],
                "training": [curve.to_dict() for curve in made.curves],
                "machine": machine(),
                "keep_float": [choice.to_dict() for choice in made.kept_float],
                "notes": [
                    *(*source.notes, *left_behind(source.folder), *unreached(stats), *uncorrected(recipe)),
                    *(*made.notes, *cards[0].untimed),
                    *(choice.note() for choice in made.kept_float),
                    *(note for curve in made.curves for note in curve.notes),
                ],
            }
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            cards = record(folder, output.name, manifest, verdict, cards)
    if kept is not None:
        kept.remove()
    return Outcome(output, recipe, made.sites, cards, verdict, limit, trials, task.description, manifest)


def record(
    folder: Path, name: str, manifest: dict[str, Any], verdict: Verdict, cards: list[Scorecard]
) -> list[Scorecard]:
    """Write `tersor.json` and the model card, which state the size of the folder they are part of.

    More bytes can take more digits to state, or fewer ("1000 kB", "1 MB"): what the folder falls short of the stated
    size is filled with spaces.
    """
    original, compressed = cards
    others, card = listing(folder, manifest["files"]), folder / "README.md"
    stated, needed = 0, 1
    while needed > stated:
        stated = needed
        compressed = replace(compressed, folder_bytes=stated)
        manifest["scorecards"] = [original.to_dict(), compressed.to_dict()]
        card.write_text(model_card(name, manifest, verdict, [original, compressed]), encoding="utf-8")
        manifest["files"] = others | {card.name: entry_of(card)}
        text = as_text(manifest)
        needed = sum(entry["bytes"] for entry in manifest["files"].values()) + len(text.encode())
    (folder / MANIFEST).write_text(text + " " * (stated - needed), encoding="utf-8")
    return [original, compressed]


def defensible(trials: list[Trial], tolerance: Tolerance) -> Trial:
    """The smallest trial within the tolerance. Raises BudgetError with the nearest points."""
    best = smallest_within(trials)
    if best is None:
        raise BudgetError(
            f"--drop {tolerance}: no size tried can be defended with {trials[0].verdict.num_examples} examples; "
            f"nearest points: {nearest_points(trials)}. More examples or a larger --drop would help"
        )
    return best


@contextmanager
def told(trials: Trials) -> Iterator[None]:
    """Have what stops a search say what it found, and how to go on."""
    try:
        yield
    except BaseException as stop:
        if trials.finished:
            stop.add_note(trials.way_on())
        raise


def identity(task: Task, seed: int) -> list[str]:
    """Everything that scores depend on beside the model, as text."""
    return [version("tersor"), task.name, task.description, str(task.fingerprint), str(seed)]


def sums_of(model: nn.Module) -> list[str]:
    """A line for every parameter that changes with its values."""
    return [f"{name} {parameter.detach().double().sum().item()}" for name, parameter in model.named_parameters()]


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """True if two models hold the same bits under the same names."""
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def unreached(stats: Mapping[str, Stats]) -> list[str]:
    """A note for the sites that calibration data never reached: nothing is known about what they cost."""
    names = [name for name, found in stats.items() if found.row_weight is not None and not found.row_weight.any()]
    if not names:
        return []
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return [
        f"the task never uses {listed}: a budget squeezes what costs the task nothing; --rule or --exclude protects it"
    ]


def uncorrected(recipe: Recipe) -> list[str]:
    """A note for a bias correction that the method of a step makes superfluous."""
    schemes = [parse_rule(step.scheme) for step in recipe.weights if step.bias_correction]
    return [
        f"bias correction leaves the sites of {scheme} alone, which repairs earlier errors itself; mse or "
        f"gptq(drift=0) does not"
        for scheme in schemes
        if scheme is not None and "cross_moment" in scheme.method.needs
    ]


def about(source: Source) -> dict[str, Any]:
    """The manifest's description of the model's origin."""
    if source.kind == "custom":
        return {"model": {"class": type(source.model).__name__, "factory": source.architecture}}
    return {"model": {"class": source.architecture}}


def evaluate_model(
    model: str,
    *,
    weights: Path | None = None,
    task_choice: TaskChoice = TaskChoice(),
    batch_sizes: Sequence[int] | None = None,
    num_threads: int = 1,
    timing_seconds: float | None = None,
    lazy: bool = False,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> tuple[Scorecard, str]:
    """The scorecard of one model or artifact, and what it was measured on; with `lazy`, entropy-coded sites stay in
    their file until they run."""
    cards, description, _ = compare_models(
        [model],
        [weights] if weights else [],
        task_choice=task_choice,
        batch_sizes=batch_sizes,
        num_threads=num_threads,
        timing_seconds=timing_seconds,
        lazy=lazy,
        dtype=dtype,
        progress=progress,
    )
    return cards[0], description


def compare_models(
    names: Sequence[str],
    weights: Sequence[Path] = (),
    *,
    task_choice: TaskChoice = TaskChoice(),
    drop: str = DEFAULT_DROP,
    seed: int = 0,
    batch_sizes: Sequence[int] | None = None,
    num_threads: int = 1,
    timing_seconds: float | None = None,
    lazy: bool = False,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> tuple[list[Scorecard], str, list[Verdict]]:
    """Scorecards of all models, measured together, and each one's verdict against the first."""
    began = time.perf_counter()
    tolerance = Tolerance.parse(drop)
    torch.manual_seed(seed)
    factories = [name for name in names if ":" in name]
    if len(weights) > len(factories):
        raise InputError(
            f"{len(weights)} --weights for {len(factories)} models given as package.module:factory; one each"
        )
    files = iter([*weights, *[None] * len(names)])
    sources = [open_model(name, weights=next(files) if ":" in name else None, lazy=lazy, dtype=dtype) for name in names]
    task = open_task_for(sources[0], task_choice)
    task.prepare(sources[0].model)
    scores = [score(task, source.model, progress, f"evaluating {source.name}") for source in sources]
    subjects = [Subject(s.name, s.model, s.num_bytes or size_of(s.model)) for s in sources]
    limit = TimeLimit(timing_seconds, time.perf_counter() - began)
    cards = measure(
        subjects, scores, task, batch_sizes=batch_sizes, num_threads=num_threads, limit=limit, progress=progress
    )
    verdicts = [judge(scores[0], other, tolerance, seed=seed) for other in scores[1:]]
    return cards, task.description, verdicts
