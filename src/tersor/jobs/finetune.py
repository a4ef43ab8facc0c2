"""The whole jobs of `tersor finetune` and `tersor merge`: open, train or merge, write, measure, judge.

Both write plain folders: what full fine-tuning gives is a Hugging Face model like the one that came, an adapter is
peft's, and a merged model is of the kind its base is. `training.json` or `merge.json` says how it was made.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.adapters import Adapter, adapted_names, load_adapter, save_adapter
from tersor.checkpoint.artifact import WEIGHTS, fill
from tersor.checkpoint.layout import packed_sites, tensors_of
from tersor.checkpoint.open import open_model
from tersor.checkpoint.output import atomic_folder, check_output
from tersor.checkpoint.side_files import copy_side_files, left_behind
from tersor.checkpoint.source import Source
from tersor.core.errors import InputError
from tersor.core.progress import Progress, silent
from tersor.core.weights_file import write_weights
from tersor.jobs.compress import DEFAULT_DROP, about
from tersor.jobs.task_choice import TaskChoice, open_task_for
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, Verdict, judge
from tersor.pipeline import key_of
from tersor.recipe import Recipe
from tersor.search.trials import ALPHA
from tersor.tasks import Task
from tersor.tasks.progress import score
from tersor.tasks.scores import Scores
from tersor.training import FinetuneStep, Job, LoraStep
from tersor.training.journal import Journal, journal_for
from tersor.training.loop import Curve, check_trainable
from tersor.training.lora import check_lora, train_adapter
from tersor.training.merge import divergences, merge, naive, own_float_copy, unmerged

TRAINING, MERGE = "training.json", "merge.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Finetuned:
    """What `tersor finetune` made and measured.

    Attributes:
        before, after: scores of the model as it came, packed base and all, and trained.
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


def finetune_to_folder(
    model: str,
    output: Path,
    step: FinetuneStep | LoraStep,
    *,
    weights: Path | None = None,
    task_choice: TaskChoice = TaskChoice(),
    drop: str = DEFAULT_DROP,
    dtype: str = "auto",
    save_base: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Finetuned:
    """Train `model` or adapters beside its weights, and write `output`. A run that was killed goes on where it was.

    Args:
        dtype: `float32` or `bfloat16`, which the model computes in; `auto`: float32 where everything is trained, and as
            it came where adapters are. What is written has the dtype that came.
        save_base: also write the packed base of an adapter there, as an artifact: what `tersor merge` takes.

    Raises a TersorError with the way out, and then leaves nothing behind but the journal of training.
    """
    check_output(output, overwrite)
    if task_choice.task in (None, "fidelity"):
        raise InputError(
            "finetune needs labels or a text: add --task perplexity (or classification, ...) and --train FILE"
        )
    tolerance, lora = Tolerance.parse(drop), isinstance(step, LoraStep)
    if save_base is not None:
        if not isinstance(step, LoraStep) or step.base == "keep":
            raise InputError("--save-base writes what --base packs; add --lora r=16 and --base nf4, or leave it out")
        check_output(save_base, overwrite)
        if os.path.realpath(save_base) == os.path.realpath(output):
            raise InputError(f"--save-base {save_base} is --output, too; give it a folder of its own")
    torch.manual_seed(seed)
    source = open_model(model, weights=weights)
    if source.kind == "artifact" and not lora:
        raise InputError(f"{model}: packed weights cannot be trained; add --lora r=16, or fine-tune the float model")
    if lora and source.kind == "custom":
        raise InputError(f"{model}: adapter files name a model folder; use the recipe step lora for {source.name}")
    if isinstance(step, LoraStep):
        check_lora(source.model, step)
    kinds = types_of(source.model)
    cast(source.model, ("auto" if lora else "float32") if dtype == "auto" else dtype)
    task = open_task_for(source, task_choice)
    check_trainable(task, "finetune")
    task.prepare(source.model)
    before = score(task, source.model, progress, "evaluating before training")
    recipe = Recipe(seed=seed, steps=(step,))
    key = f"{key_of(source.model, recipe, 0, task)} {sorted(source.hashes.items())} {dtype}"
    with journal_for(output) as folder, atomic_folder(output, overwrite) as place:
        journal = Journal(folder / "step-0.safetensors", key) if folder else None
        job = Job(source.model, source.model, task, seed, progress, journal=journal)
        if isinstance(step, LoraStep):
            adapted, curve = train_adapter(job, step)
            save_adapter(adapted.adapter, place, source.name)
            after = score(task, adapted.model, progress, "evaluating after training")
            if save_base is not None:
                write_base(adapted.without(), kinds, save_base, source, overwrite)
        else:
            step.run(job)
            curve = job.curves[0]
            set_types(job.model, kinds)
            save_plain(job.model, place, source)
            trained = open_model(str(place)).model if source.kind == "transformers" else job.model
            after = score(task, trained, progress, "evaluating after training")
        verdict = judge(before, after, tolerance, ALPHA, seed)
        left = [] if lora else left_behind(source.folder)
        notes = (*source.notes, *left, *curve.notes)
        made = Finetuned(output, step, before, after, verdict, curve, task.description, notes)
        (place / TRAINING).write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")
    return made


def write_base(
    model: nn.Module, kinds: Mapping[str, torch.dtype], folder: Path, source: Source, overwrite: bool
) -> None:
    """The packed base as an artifact, in the dtypes that came."""
    set_types(model, kinds)
    for site, packed, _ in packed_sites(model):
        packed.dtype = kinds.get(site.parameter, packed.dtype)
    with atomic_folder(folder, overwrite) as place:
        fill(model, place, source=source.folder, manifest=about(source))


def save_plain(model: nn.Module, folder: Path, source: Source) -> None:
    """A float model as it came: a Hugging Face folder with config and tokenizer, or a file of tensors."""
    if source.kind != "transformers":
        write_weights(tensors_of(model), folder / WEIGHTS)
        return
    model.save_pretrained(folder)  # type: ignore[operator]
    if source.folder is not None:
        copy_side_files(source.folder, folder)


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every float parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}


def set_types(model: nn.Module, kinds: Mapping[str, torch.dtype]) -> None:
    """Give parameters and buffers these dtypes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in kinds:
            tensor.data = tensor.data.to(kinds[name])


def cast(model: nn.Module, dtype: str) -> None:
    """Compute in this dtype; `auto` leaves everything as it is."""
    if dtype == "auto":
        return
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is none of auto, {', '.join(DTYPES)}")
    model.to(DTYPES[dtype])


# Merging.


@dataclass(frozen=True)
class Merged:
    """What `tersor merge` made.

    Attributes:
        kl: how far each model is from the base with the adapter beside its weights (`divergences`): `base` without the
            adapter, `naive` rounding (packed bases only), and `merged`, which was written.
        unit: of these numbers.
        num_packed: how many of the adapted weights are packed.
    """

    output: Path
    kl: dict[str, float]
    unit: str
    num_packed: int
    task: str
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output), "machine": machine()}


def merge_to_folder(
    base: str,
    adapter: Path,
    output: Path,
    *,
    task_choice: TaskChoice = TaskChoice(),
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Merged:
    """Merge an adapter into its base, a Hugging Face folder or an artifact, and write a model of the same kind.

    The task's calibration split is what packed weights are rounded for; its evaluation split is what the divergences
    are measured on. Raises a TersorError with the way out, and then leaves nothing behind.
    """
    check_output(output, overwrite)
    torch.manual_seed(seed)
    given = load_adapter(adapter)
    source = open_model(base)
    if source.kind == "custom":
        raise InputError(f"{base}: adapter files name a model folder; use the recipe step lora for a custom model")
    task = open_task_for(source, task_choice)
    merged = merge(source.model, given, task, seed=seed, progress=progress)
    num_packed = len(packed_names(source.model, given))
    with atomic_folder(output, overwrite) as place:
        if source.kind == "artifact":
            fill(merged, place, source=source.folder, manifest=about(source) | {"adapter": adapter.resolve().name})
        else:
            save_plain(merged, place, source)
        kl = measure_divergences(source.model, given, merged, task, seed, progress, rounded=num_packed > 0)
        unit = "nats per prediction" if task.output == "logits" else "squared distance per example"
        made = Merged(output, kl, unit, num_packed, task.description, source.notes)
        (place / MERGE).write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")
    return made


def packed_names(model: nn.Module, adapter: Adapter) -> list[str]:
    """The adapted weights that are packed."""
    packed = {site.owners[0].module for site, _, _ in packed_sites(model)}
    return [name for name in adapted_names(adapter) if name in packed]


def measure_divergences(
    base: nn.Module, adapter: Adapter, merged: nn.Module, task: Task, seed: int, progress: Progress, *, rounded: bool
) -> dict[str, float]:
    """Divergences from the base with the adapter beside its weights, on the evaluation split, in float32."""
    progress("measuring divergences", 0, 1)
    models: dict[str, nn.Module] = {"base": own_float_copy(base)}
    if rounded:
        models["naive"] = own_float_copy(merge(base, adapter, task, method=naive, seed=seed))
    models["merged"] = own_float_copy(merged)
    found = divergences(unmerged(base, adapter), models, task)
    progress("measuring divergences", 1, 1)
    return found
