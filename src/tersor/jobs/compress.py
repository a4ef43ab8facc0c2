"""The job of `tersor compress`: open, measure, choose, compress, write, load back, measure again, judge.

What is measured is what was written: the artifact is loaded from its temporary folder before it is scored, and the
folder appears under its own name only when everything went well.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.calibration.curvature import estimate_fisher
from tersor.checkpoint.artifact import load, write
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.layout import packed_sites, tensors_of
from tersor.checkpoint.manifest import read_manifest, weights_path
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.output import atomic_folder, check_output, claimed
from tersor.checkpoint.seal import MANIFEST, as_text, entry_of, listing
from tersor.checkpoint.side_files import left_behind
from tersor.checkpoint.source import Source
from tersor.core.arguments import checked
from tersor.core.errors import BudgetError, InputError
from tersor.core.progress import Events
from tersor.jobs.settings import Output, Timing
from tersor.measure.latency import TimeLimit
from tersor.measure.scorecard import Scorecard, Subject, machine, measure
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.methods.stats import Stats
from tersor.nn.copies import own_shared_weights
from tersor.nn.dtypes import computing_in, set_types
from tersor.nn.sites import check_has_sites
from tersor.pipeline import Compressed, check_steps, run
from tersor.recipe import Recipe
from tersor.report.card import model_card
from tersor.report.hints import slow_here
from tersor.schemes.scheme import KEEP, parse_rule
from tersor.search.choices import Choices
from tersor.search.drop import search_drop
from tersor.search.limit import Limit
from tersor.search.noise_level import NoiseLevelSearch, check_codable
from tersor.search.plan import CANDIDATES, check_reachable, measure_menus, plan_and_make
from tersor.search.runners.contract import TrialSpec, Workbench
from tersor.search.runners.serial import SerialRunner
from tersor.search.trials import ALPHA, Trial, TrialJournal, Trials, nearest_points, smallest_within
from tersor.steps.weights import WeightsStep
from tersor.tasks.contract import Task
from tersor.tasks.data import Data
from tersor.tasks.progress import score
from tersor.tasks.scores import Scores
from tersor.training.journal import journal_for

DEFAULT_DROP = "1%"


@dataclass(frozen=True)
class Result(Compressed):
    """A compressed model, how it was made, and what was measured of it.

    Attributes:
        model: the compressed model, loaded back from the folder that was written.
        output: this folder.
        scorecards: scorecards of the original and of the compressed model.
        verdict: their paired comparison.
        limit: on the weights file, where one was asked for.
        trials: the trials of a search, in their order.
        task: the task and its data, in words.
        manifest: all of this as `tersor.json` holds it.
        kept: an object that lives as long as the result, such as the temporary folder that holds `output`.
    """

    output: Path = Path()
    scorecards: list[Scorecard] = field(default_factory=list)
    verdict: Verdict | None = None
    limit: Limit | None = None
    trials: list[Trial] = field(default_factory=list)
    task: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list, repr=False)

    @property
    def report(self) -> str:
        """The model card: what was done and measured, as Markdown; of a model that was not measured, its sites."""
        if self.verdict is not None:
            return (self.output / "README.md").read_text(encoding="utf-8")
        return "\n".join(
            f"{site.name}: {site.scheme}, {site.bits_per_weight:.2f} bits per weight" for site in self.sites
        )

    @checked()
    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the model with all that is known of it. Raises InputError where something is in the way."""
        output = Output(Path(folder), overwrite)
        check_output(output.path, output.overwrite)
        with atomic_folder(output.path, output.overwrite) as working:
            if self.verdict is None:
                write(self.model, working)
                return
            shutil.copytree(self.output, working, dirs_exist_ok=True)
            record(working, output.path.name, dict(self.manifest), self.verdict, self.scorecards)


@dataclass(frozen=True)
class Original:
    """The model that is to be made smaller, scored, and what is asked of the smaller one."""

    spec: ModelSpec
    source: Source
    num_bytes: int
    data: Data
    task: Task
    scores: Scores
    limit: Limit | None
    tolerance: Tolerance
    began: float


@dataclass(frozen=True)
class Found:
    """The recipe that meets what was asked; the model, where the search made it already; and what it went through."""

    recipe: Recipe
    made: Compressed | None = None
    stats: Mapping[str, Stats] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    journal: TrialJournal = field(default_factory=TrialJournal)


def compress(
    model: ModelSpec,
    output: Output,
    data: Data = Data(),
    choices: Choices = Choices(),
    timing: Timing = Timing(),
    events: Events = Events(),
) -> Result:
    """Make a model smaller, as `choices` say, write it, and judge what was written.

    Raises a TersorError with the way out, and then leaves nothing behind but the journal of a search or a training.
    """
    with claimed(output.path, output.overwrite):
        Tolerance.parse(choices.budget.drop or DEFAULT_DROP)
        spelled_out = choices.spelled_out
        torch.manual_seed(choices.seed)
        original = open_original(model, data, choices, events)
        if spelled_out is not None:
            found = Found(spelled_out)
        else:
            found = search(original, output.path, choices, events)
        with journal_for(output.path, found.recipe.trains) as journal:
            made = found.made or run(
                found.recipe,
                original.source.model,
                original.task,
                stats=found.stats,
                journal=journal,
                events=events,
            )
            result = write_and_judge(original, replace(found, made=made), output, choices.seed, timing, events)
        found.journal.remove()
        return result


def open_original(model: ModelSpec, data: Data, choices: Choices, events: Events) -> Original:
    """Open the model and its data, score it, and refuse before long work what cannot come out well."""
    began, budget, recipe = time.perf_counter(), choices.budget, choices.spelled_out
    events.on_progress("opening the model", 0, 1)
    source = model.open_to_run()
    check_has_sites(source.model)
    if source.kind == "artifact":
        raise InputError(f"{model.name} is a tersor artifact already; compress the original model instead")
    events.on_progress("opening the model", 1, 1)
    num_bytes = source.num_bytes or size_of(source.model)
    num_parameters = sum(parameter.numel() for parameter in source.model.parameters())
    limit = Limit.of(
        original_bytes=num_bytes,
        num_parameters=num_parameters,
        size=budget.size,
        ratio=budget.ratio,
        bits=budget.bits,
    )
    check_steps(recipe, source.model, is_whole=False)
    for note in slow_here(int8_schemes(recipe)):
        events.on_note(note)
    if recipe is None and not budget.coded:
        check_reachable(source.model, fixed_sites(choices), choices.formats or CANDIDATES, limit)
    if budget.coded and limit is not None:
        check_codable(source.model, fixed_sites(choices), limit)
    task = data.open(source)
    check_steps(recipe, source.model, task)
    task.prepare(source.model)
    scores = score(task, source.model, events.on_progress, "evaluating the original")
    return Original(
        model, source, num_bytes, data, task, scores, limit, Tolerance.parse(budget.drop or DEFAULT_DROP), began
    )


def int8_schemes(recipe: Recipe | None) -> list[str]:
    """The schemes of a recipe that round inputs to integers; none where a search is to find them."""
    steps = recipe.weights if recipe is not None else ()
    texts = [text for step in steps for text in (step.scheme, *step.rules.values())]
    schemes = [(text, parse_rule(text)) for text in dict.fromkeys(texts)]
    return [text for text, scheme in schemes if scheme is not None and scheme.activation is not None]


def fixed_sites(choices: Choices) -> WeightsStep:
    """The step that fixes what rules and excludes say, and leaves the rest to a search."""
    return Recipe.of(KEEP, dict(choices.rules), choices.exclude).weights[0]


def search(original: Original, output: Path, choices: Choices, events: Events) -> Found:
    """The recipe that meets the budget. Raises BudgetError with the nearest points where none does."""
    model, task, limit, seed = original.source.model, original.task, original.limit, choices.seed
    coded, step, progress = choices.budget.coded, fixed_sites(choices), events.on_progress
    stats = estimate_fisher(model, task, seed=seed, progress=progress)
    menus = [] if coded else measure_menus(model, stats, step, choices.formats or CANDIDATES, progress)
    levels = NoiseLevelSearch(model, task, step, stats, seed, progress, num_states=choices.budget.trellis)
    if limit is not None:
        if coded:
            made = levels.within(limit).made
        else:
            made = plan_and_make(model, menus, limit, levels.compressed, seed)
        return Found(made.recipe, made, stats)
    kept = TrialJournal(output.with_name(f".{output.name}.trials"), identity(original, choices))
    spec = TrialSpec(original.spec, original.data, seed=seed)
    runner = SerialRunner([(spec, Workbench(model, task, stats))], events)
    trials = Trials(spec, runner, original.scores, original.tolerance, events.on_trial, kept)
    with noting_progress(trials):
        if coded:
            levels.defended(trials)
        else:
            search_drop(model, menus, trials)
    try:
        best = defensible(trials.finished, original.tolerance)
    except BudgetError:
        kept.remove()
        raise
    return Found(best.recipe, trials.best, stats, trials.finished, kept)


def write_and_judge(
    original: Original, found: Found, output: Output, seed: int, timing: Timing, events: Events
) -> Result:
    """Write the model that was made, load it back, measure and judge it, and write down what was found."""
    source, task, limit, made = original.source, original.task, original.limit, found.made
    assert made is not None
    with atomic_folder(output.path, output.overwrite) as folder:
        write(as_it_came(made.model, source), folder, source=source.folder, manifest=about(source))
        loaded = load(folder, model=source.fresh())
        file_bytes = weights_path(folder, read_manifest(folder)).stat().st_size
        if limit is not None and file_bytes > limit.num_bytes:
            raise BudgetError(f"{limit.text} is {limit.num_bytes:,} bytes, and the file came out at {file_bytes:,}")
        known = smallest_within(found.trials)
        # The file may hold what a trial measured.
        measured = known.scores if known is not None and same_tensors(made.model, loaded) else None
        with computing_in(loaded, torch.float32 if source.dtypes else None):
            scores = measured or score(task, loaded, events.on_progress, "evaluating the compressed model")
            cards = measure(
                [
                    Subject("original", source.model, original.num_bytes),
                    Subject("compressed", loaded, file_bytes),
                ],
                [original.scores, scores],
                task,
                batch_sizes=timing.batch_sizes,
                num_threads=timing.threads[0],
                limit=TimeLimit(timing.timing_seconds, time.perf_counter() - original.began),
                progress=events.on_progress,
            )
        # After a search the chosen trial is held to the search's stricter level, on the scores of the loaded file.
        alpha = found.trials[0].verdict.alpha if found.trials else ALPHA
        verdict = judge(original.scores, scores, original.tolerance, alpha, seed)
        manifest = read_manifest(folder) | described(original, found, made, verdict, seed)
        manifest["notes"] += cards[0].untimed
        (folder / "recipe.yaml").write_text(made.recipe.to_yaml(), encoding="utf-8")
        cards = record(folder, output.path.name, manifest, verdict, cards)
    for note in manifest["notes"]:
        events.on_note(note)
    facts = {name: getattr(made, name) for name in ("recipe", "sites", "curves", "kept_float")}
    return Result(
        loaded,
        **facts,
        notes=manifest["notes"],
        output=output.path,
        scorecards=cards,
        verdict=verdict,
        limit=limit,
        trials=found.trials,
        task=task.description,
        manifest=manifest,
    )


def as_it_came(model: nn.Module, source: Source) -> nn.Module:
    """A copy of the compressed model in the dtypes of the original file, for storing; it may be computed in others.

    The original is not changed.
    """
    if source.dtypes is not None:
        own_shared_weights(model, source.model)
        set_types(model, source.dtypes)
        for site, packed, _ in packed_sites(model):
            packed.dtype = source.dtypes.get(site.parameter, packed.dtype)
    return model


def described(original: Original, found: Found, made: Compressed, verdict: Verdict, seed: int) -> dict[str, Any]:
    """The manifest's account of a run, beside the files and the scorecards."""
    source, task, limit = original.source, original.task, original.limit
    return {
        "source": {"name": source.title, "hashes": source.hashes, "bytes": original.num_bytes},
        "task": {"name": task.name, "description": task.description, "fingerprint": task.fingerprint},
        "recipe": made.recipe.model_dump(mode="json"),
        "seed": seed,
        "limit": {"text": limit.text, "bytes": limit.num_bytes} if limit else None,
        "site_reports": [report.to_dict() for report in made.sites],
        "verdict": verdict.to_dict(),
        "trials": [{"bytes": t.num_bytes, "score": t.score, "verdict": t.verdict.to_dict()} for t in found.trials],
        "training": [curve.to_dict() for curve in made.curves],
        "machine": machine(),
        "keep_float": [choice.to_dict() for choice in made.kept_float],
        "notes": [
            *(*source.notes, *left_behind(source.folder), *unreached(found.stats), *uncorrected(made.recipe)),
            *made.notes,
            *(choice.note() for choice in made.kept_float),
            *(note for curve in made.curves for note in curve.notes),
        ],
    }


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
            f"--drop {tolerance}: no size that was tried is surely within it by "
            f"{trials[0].verdict.num_examples} examples; nearest points: "
            f"{nearest_points(trials)}. More examples or a larger --drop would help"
        )
    return best


@contextmanager
def noting_progress(trials: Trials) -> Iterator[None]:
    """Add to what stops a search, an interrupt too, a note on the trials done and how to go on."""
    try:
        yield
    except BaseException as stop:
        if trials.finished:
            stop.add_note(trials.way_on())
        raise


def identity(original: Original, choices: Choices) -> list[str]:
    """Texts that differ whenever the trials of a search would: version, choices, weights and data."""
    source, task = original.source, original.task
    parameters = source.model.named_parameters()
    sums = [f"{name} {each.dtype} {each.detach().double().sum().item()}" for name, each in parameters]
    data = [task.name, task.description, str(task.fingerprint)]
    return [version("tersor"), repr(choices), *source.hashes.values(), *sums, *data]


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """True if two models hold the same bits under the same names."""
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def unreached(stats: Mapping[str, Stats]) -> list[str]:
    """A note that names the layers without any effect on the calibration data: their loss cannot be predicted."""
    names = [name for name, found in stats.items() if found.row_weight is not None and not found.row_weight.any()]
    if not names:
        return []
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return [
        f"the task never uses {listed}: a size limit compresses most what the task does not use; --rule or --exclude "
        f"protects it"
    ]


def uncorrected(recipe: Recipe) -> list[str]:
    """A note for each step whose method corrects earlier errors itself, so that biases are left alone."""
    schemes = [parse_rule(step.scheme) for step in recipe.weights if step.bias_correction]
    return [
        f"bias correction skips the layers of {scheme}, a method that corrects the errors of earlier layers itself; "
        f"to have it applied, use mse or gptq(upstream_correction=0)"
        for scheme in schemes
        if scheme is not None and "cross_moment" in scheme.method.needs
    ]


def about(source: Source) -> dict[str, Any]:
    """The manifest's description of the model's origin."""
    if source.kind == "custom":
        factory = source.architecture if ":" in source.architecture else None
        return {"model": {"class": type(source.model).__name__, "factory": factory}}
    return {"model": {"class": source.architecture}}
