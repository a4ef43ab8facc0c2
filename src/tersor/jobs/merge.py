"""The job of `tersor merge`: open a base and an adapter, merge, write, measure.

A merged model is of the kind its base is: a Hugging Face folder, or an artifact. `merge.json` says how it was made.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.adapters import Adapter, adapted_names, load_adapter
from tersor.checkpoint.artifact import write
from tersor.checkpoint.layout import packed_sites
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.output import atomic_folder, claimed
from tersor.core.errors import InputError
from tersor.core.progress import Events, Progress
from tersor.jobs.compress import about
from tersor.jobs.finetune import save_plain
from tersor.jobs.settings import Output
from tersor.measure.scorecard import machine
from tersor.tasks import Task
from tersor.tasks.data import Data
from tersor.training.merge import divergences, naive, own_float_copy, unmerged
from tersor.training.merge import merge as merge_into

MERGE = "merge.json"


@dataclass(frozen=True)
class Merged:
    """The result of `tersor merge`: the model written, and how far it is from the base with its adapter.

    Attributes:
        kl: how far each model is from the base with the adapter beside its weights (`divergences`): `base` without the
            adapter, `naive` rounding (packed bases only), and `merged`, which was written.
        unit: the unit of these numbers.
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


def merge(
    base: ModelSpec,
    adapter: Path,
    output: Output,
    data: Data = Data(),
    seed: int = 0,
    events: Events = Events(),
) -> Merged:
    """Merge an adapter into its base, a Hugging Face folder or an artifact, and write a model of the same kind.

    The task's calibration split is what packed weights are rounded for; its evaluation split is what the divergences
    are measured on. Raises a TersorError with the way out, and then leaves nothing behind.
    """
    with claimed(output.path, output.overwrite):
        torch.manual_seed(seed)
        given = load_adapter(adapter)
        source = base.open()
        if source.kind == "custom":
            raise InputError(
                f"{base.name}: adapter files name a model folder; use the recipe step lora for a custom model"
            )
        task = data.open(source)
        merged = merge_into(source.model, given, task, seed=seed, progress=events.on_progress)
        num_packed = len(packed_names(source.model, given))
        with atomic_folder(output.path, output.overwrite) as place:
            if source.kind == "artifact":
                write(merged, place, source=source.folder, manifest=about(source) | {"adapter": adapter.resolve().name})
            else:
                save_plain(merged, place, source)
            kl = measure_divergences(
                source.model, given, merged, task, seed, events.on_progress, rounded=num_packed > 0
            )
            unit = "nats per prediction" if task.output == "logits" else "squared distance per example"
            made = Merged(output.path, kl, unit, num_packed, task.description, source.notes)
            (place / MERGE).write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")
        for note in made.notes:
            events.on_note(note)
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
        models["naive"] = own_float_copy(merge_into(base, adapter, task, method=naive, seed=seed))
    models["merged"] = own_float_copy(merged)
    found = divergences(unmerged(base, adapter), models, task)
    progress("measuring divergences", 1, 1)
    return found
