"""The job of `tersor finetune`: open, measure, train, write, measure again, judge.

Full fine-tuning writes a Hugging Face model like the one given; an adapter is written as peft writes it.
`training.json` says how it was made.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.adapters import save_adapter
from tersor.checkpoint.artifact import WEIGHTS, write
from tersor.checkpoint.layout import packed_sites, tensors_of
from tersor.checkpoint.open import ModelSpec, cast, open_model
from tersor.checkpoint.output import atomic_folder, check_output
from tersor.checkpoint.side_files import copy_side_files, left_behind
from tersor.checkpoint.source import Source
from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.core.weights_file import write_weights
from tersor.jobs.compress import DEFAULT_DROP, about
from tersor.jobs.settings import Output
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.nn.dtypes import set_types, types_of
from tersor.pipeline import key_of
from tersor.recipe import Recipe
from tersor.search.trials import ALPHA
from tersor.tasks.data import Data
from tersor.tasks.progress import score
from tersor.tasks.scores import Scores
from tersor.training import FinetuneStep, Job, LoraStep
from tersor.training.journal import Journal, journal_for
from tersor.training.loop import Curve
from tersor.training.lora import Adapted, check_lora, train_adapter
from tersor.training.settings import check_trainable

TRAINING = "training.json"


@dataclass(frozen=True)
class Finetuned:
    """The result of `tersor finetune`: scores before and after training, and the verdict.

    Attributes:
        before, after: scores of the model as given (with its packed base, if any) and of the trained one.
        verdict: the paired comparison of the two.
    """

    output: Path
    step: FinetuneStep | LoraStep
    before: Scores
    after: Scores
    verdict: Verdict
    curve: Curve
    task: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step.model_dump(mode="json"),
            "task": self.task,
            "metric": self.before.metric.name,
            "before": self.before.value,
            "after": self.after.value,
            "verdict": self.verdict.to_dict(),
            "training": self.curve.to_dict(),
            "notes": list(self.notes),
            "machine": machine(),
        }


@dataclass(frozen=True)
class Training:
    """Settings of training, and of the verdict after it.

    Attributes:
        step: trains the whole model, or adapters beside its weights.
        drop: the largest tolerated loss of the score.
        save_base: where the packed base of an adapter is written, too, as an artifact that `tersor merge` takes.
        seed: seed of all random numbers.
    """

    step: FinetuneStep | LoraStep
    drop: str = DEFAULT_DROP
    save_base: Path | None = None
    seed: int = 0


def step_named(kind: str, fields: Mapping[str, Any]) -> FinetuneStep | LoraStep:
    """A training step of these fields; those that are None are left out. Raises InputError for a wrong one."""
    given = {name: value for name, value in fields.items() if value is not None}
    made = Recipe.validated({"steps": [{"step": kind, **given}]}, "finetune").steps[0]
    assert isinstance(made, FinetuneStep | LoraStep)
    return made


def finetune(
    model: ModelSpec, output: Output, training: Training, data: Data = Data(), events: Events = Events()
) -> Finetuned:
    """Train a model or adapters beside its weights, and write `output`. A run that was killed goes on where it was.

    Args:
        model: its `dtype` is what is computed in; None: float32 where everything is trained, and as it came where
            adapters are. What is written has the dtype that came.

    Raises a TersorError with the way out, and then leaves nothing behind but the journal of training.
    """
    check_training(output, training, data)
    torch.manual_seed(training.seed)
    source = open_trainable(model, training.step)
    kinds = types_of(source.model)
    dtype = model.dtype or (None if isinstance(training.step, LoraStep) else torch.float32)
    if dtype is not None:
        cast(source, dtype)
    task = data.open(source)
    check_trainable(task, "finetune")
    task.prepare(source.model)
    before = score(task, source.model, events.on_progress, "evaluating before training")
    recipe = Recipe(seed=training.seed, steps=(training.step,))
    key = f"{key_of(source.model, recipe, 0, task)} {sorted(source.hashes.items())} {dtype}"
    with journal_for(output.path) as folder, atomic_folder(output.path, output.overwrite) as place:
        journal = Journal(folder / "step-0.safetensors", key) if folder else None
        job = Job(source.model, source.model, task, training.seed, events.on_progress, journal=journal)
        trained, curve, adapted = train_and_write(job, training.step, source, kinds, place)
        after = score(task, trained, events.on_progress, "evaluating after training")
        if adapted is not None and training.save_base is not None:  # which takes the adapters out
            write_base(adapted.without(), kinds, training.save_base, source, output.overwrite)
        verdict = judge(before, after, Tolerance.parse(training.drop), ALPHA, training.seed)
        left = [] if isinstance(training.step, LoraStep) else left_behind(source.folder)
        notes = (*source.notes, *left, *curve.notes)
        made = Finetuned(output.path, training.step, before, after, verdict, curve, task.description, notes)
        (place / TRAINING).write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")
    for note in notes:
        events.on_note(note)
    return made


def check_training(output: Output, training: Training, data: Data) -> None:
    """Raise InputError, before anything is opened, for settings at odds or an output that is in the way."""
    check_output(output.path, output.overwrite)
    if data.task in (None, "fidelity"):
        raise InputError(
            "finetune needs labels or a text: add --task perplexity (or classification, ...) and --train FILE"
        )
    Tolerance.parse(training.drop)
    step, save_base = training.step, training.save_base
    if save_base is not None:
        if not isinstance(step, LoraStep) or step.base == "keep":
            raise InputError("--save-base writes what --base packs; add --lora r=16 and --base nf4, or leave it out")
        check_output(save_base, output.overwrite)
        if os.path.realpath(save_base) == os.path.realpath(output.path):
            raise InputError(f"--save-base {save_base} is --output, too; give it a folder of its own")


def open_trainable(model: ModelSpec, step: FinetuneStep | LoraStep) -> Source:
    """The model in the dtypes it came in. Raises InputError for one that the step cannot train."""
    source = replace(model, dtype=None).open()
    if isinstance(step, FinetuneStep) and source.kind == "artifact":
        raise InputError(
            f"{model.name}: packed weights cannot be trained; add --lora r=16, or fine-tune the float model"
        )
    if isinstance(step, LoraStep):
        if source.kind == "custom":
            raise InputError(
                f"{model.name}: adapter files name a model folder; use the recipe step lora for {source.name}"
            )
        check_lora(source.model, step)
    return source


def train_and_write(
    job: Job, step: FinetuneStep | LoraStep, source: Source, kinds: Mapping[str, torch.dtype], place: Path
) -> tuple[nn.Module, Curve, Adapted | None]:
    """Train, and write what comes out into `place`: the model or the adapter. Returns the model as it is loaded back,
    how training went, and the adapters in their model, if there are any."""
    if isinstance(step, LoraStep):
        adapted, curve = train_adapter(job, step)
        save_adapter(adapted.adapter, place, source.name)
        return adapted.model, curve, adapted
    step.run(job)
    set_types(job.model, kinds)
    save_plain(job.model, place, source)
    loaded = open_model(str(place)).model if source.kind == "transformers" else job.model
    return loaded, job.curves[0], None


def write_base(
    model: nn.Module, kinds: Mapping[str, torch.dtype], folder: Path, source: Source, overwrite: bool
) -> None:
    """The packed base as an artifact, in the dtypes that came."""
    set_types(model, kinds)
    for site, packed, _ in packed_sites(model):
        packed.dtype = kinds.get(site.parameter, packed.dtype)
    with atomic_folder(folder, overwrite) as place:
        write(model, place, source=source.folder, manifest=about(source))


def save_plain(model: nn.Module, folder: Path, source: Source) -> None:
    """A float model as it came: a Hugging Face folder with config and tokenizer, or a file of tensors."""
    if source.kind != "transformers":
        write_weights(tensors_of(model), folder / WEIGHTS)
        return
    model.save_pretrained(folder)  # type: ignore[operator]
    if source.folder is not None:
        copy_side_files(source.folder, folder)
