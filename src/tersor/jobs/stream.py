"""The job of `tersor compress --stream`: a checkpoint larger than memory, compressed block by block.

Nothing is evaluated: that takes the whole original in memory. `tersor compare` does it where there is room.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tersor.calibration.moments import shows_inputs
from tersor.checkpoint.manifest import read_manifest, write_manifest
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.output import atomic_folder, check_output
from tersor.checkpoint.side_files import left_behind
from tersor.checkpoint.source import Source
from tersor.checkpoint.streaming import StreamedModel
from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.jobs.compress import about
from tersor.jobs.settings import Output
from tersor.measure.scorecard import machine
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.report.card import UNMEASURED, model_card
from tersor.search.choices import Choices
from tersor.steps.step_visitor import CURVATURE, Calibration
from tersor.steps.weights import WeightsStep
from tersor.steps.weights_run import WeightsRun
from tersor.tasks.contract import Task
from tersor.tasks.data import Data


def stream(
    model: ModelSpec, output: Output, data: Data = Data(), choices: Choices = Choices(), events: Events = Events()
) -> dict[str, Any]:
    """Make `output` from a Hugging Face checkpoint with a few blocks of it in memory. Returns the manifest.

    Args:
        data: for calibration; the task is not scored.
        choices: must amount to one weights step.
        events: `on_step` is called when a block has been written.

    Raises a TersorError with the way out, and then leaves nothing behind.
    """
    if model.weights is not None or not isinstance(model.model, str | Path):
        raise InputError("--stream reads a Hugging Face folder, and --weights goes with package.module:factory")
    recipe = choices.spelled_out
    step = only_step(recipe)
    assert recipe is not None
    check_output(output.path, output.overwrite)
    with atomic_folder(output.path, output.overwrite) as folder:
        torch.manual_seed(recipe.seed)
        events.on_progress("opening the model", 0, 1)
        streamed = StreamedModel(model.name, folder, events.on_step, model.dtype)
        source = streamed.source
        task = data.open(source)
        step = step.with_methods(find_sites(streamed.model), partial(shows_inputs, streamed.model))
        recipe = recipe.model_copy(update={"steps": (step,)})
        calibration = Calibration(
            task,
            seed=recipe.seed,
            progress=events.on_progress,
            original=streamed.original,
            block_context=streamed.block_context,
        )
        run = WeightsRun(streamed.model, step, calibration)
        events.on_progress("opening the model", 1, 1)
        run.run()
        streamed.save(about(source))
        manifest = read_manifest(folder) | described(source, task, recipe, run)
        write_manifest(folder, manifest)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "README.md").write_text(model_card(output.path.name, manifest), encoding="utf-8")
    for note in manifest["notes"]:
        events.on_note(note)
    return manifest


def described(source: Source, task: Task, recipe: Recipe, run: WeightsRun) -> dict[str, Any]:
    """The manifest's account of a run, beside the files."""
    return {
        "source": {"name": source.title, "hashes": source.hashes, "bytes": source.num_bytes},
        "task": {"name": task.name, "description": task.description, "fingerprint": task.fingerprint},
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "limit": None,
        "site_reports": [report.to_dict() for report in run.reports.values()],
        "scorecards": [],
        "verdict": None,
        "trials": [],
        "machine": machine(),
        "notes": [*source.notes, *left_behind(source.folder), *notes_of(run)],
    }


def only_step(recipe: Recipe | None) -> WeightsStep:
    """The one step of a recipe that can be done block by block. Raises InputError for any other recipe."""
    if recipe is None:
        raise InputError(
            "--stream cannot share out a budget, which takes all weights at once; say --format int4-g64, --rule or "
            "--recipe FILE"
        )
    if len(recipe.steps) != 1 or not isinstance(recipe.steps[0], WeightsStep):
        raise InputError(
            f"--stream does one weights step, and the recipe has {len(recipe.steps)} steps; leave out the others, or "
            f"--stream"
        )
    if recipe.steps[0].bias_correction:
        raise InputError("--stream leaves biases as they are; leave out --bias-correction, or --stream")
    if recipe.steps[0].keep_float != "none":
        raise InputError(
            "--stream measures no loss, which takes the whole original in memory; leave out --keep-float, or --stream"
        )
    return recipe.steps[0]


def notes_of(run: WeightsRun) -> list[str]:
    """Notes for the user about the result."""
    notes = [UNMEASURED]
    if run.needs & CURVATURE:
        notes.append("the curvature of the loss takes the whole model in memory: methods that weigh by it did without")
    return [*notes, *run.notes.values()]
