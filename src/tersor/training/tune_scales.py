"""Training of the continuous numbers of a packed model alone: scales, zero points, biases, norms.

The second phase of EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062), here taught by the original's
outputs. Codes stay as they are, so the file keeps its size and its format, and a few hundred steps are enough. Works
for every format that names `trainable_parts`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.formats.trainable import Store, Trainable
from tersor.nn.packed import PackedWeight, packed_weight
from tersor.nn.sites import find_sites
from tersor.tasks.inputs import device_of
from tersor.training.imitation import imitation
from tersor.training.job import Job
from tersor.training.loop import train
from tersor.training.norms import Norms
from tersor.training.settings import TrainingStep, check_trainable

LEFTOVERS = "leftovers"  # the module that holds what is trained, in the model


class TuneScalesStep(TrainingStep):
    """Recipe step `tune-scales`: after a weights step, train the numbers beside the codes.

    The original teaches. Rates of scales are relative to their own size; biases and norms have the same.

    Attributes:
        alpha: the labels' share of the loss; at 0 no label is needed.
        temperature: that softens the original's predictions and the model's.
    """

    step: Literal["tune-scales"] = "tune-scales"
    num_steps: int | None = Field(default=200, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    alpha: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def run(self, job: Job) -> None:
        """Train the job's model. Raises InputError where nothing is packed, and what `train` raises."""
        task = check_trainable(job.task, self.step)
        leftovers = RemainderTensors(parts_of(job.model))
        if not leftovers.parts:
            raise InputError("tune-scales: no site is packed in a format with scales; let it follow a weights step")
        norms = Norms(job.model, 0.0, self.gradient_checkpointing)
        came_from = device_of(job.teacher)
        try:
            with in_training(job.model, leftovers):
                curve = train(
                    job.model,
                    task,
                    norms.watched(imitation(task, job.teacher, self.alpha, self.temperature)),
                    self,
                    name=self.step,
                    seed=job.seed,
                    masks=job.masks,
                    groups=groups(job.model),
                    journal=job.journal,
                    progress=job.progress,
                )
        finally:
            job.teacher.to(came_from)
            norms.release()
        job.curves.append(curve)


class Part(NamedTuple):
    """A trainable part of a packed weight, and what its format says of it."""

    packed: PackedWeight
    name: str
    kind: Trainable


def parts_of(model: nn.Module) -> Iterator[Part]:
    """The trainable parts of every packed weight, tied ones once, each prepared for training."""
    for site in find_sites(model):
        packed = packed_weight(model.get_submodule(site.owners[0].module), site.owners[0].parameter)
        if packed is not None:
            yield from prepared_parts(packed)


def prepared_parts(packed: PackedWeight) -> list[Part]:
    """The trainable parts of one packed weight; the weight gets the parts that training starts from."""
    for kind in packed.format.trainable_parts.values():
        packed._buffers.update(kind.prepared(packed.tensors))
    return [Part(packed, name, kind) for name, kind in packed.format.trainable_parts.items()]


class RemainderTensors(nn.Module):
    """Float32 copies of continuous parts: `start + shift * unit`, where only the shifts are trained."""

    def __init__(self, parts: Iterable[Part]):
        super().__init__()
        self.parts = list(parts)
        self.shifts = nn.ParameterList()
        for number, part in enumerate(self.parts):
            tensors = part.packed.tensors
            start, unit = tensors[part.name].float(), part.kind.unit(tensors[part.name], tensors)
            self.register_buffer(f"start{number}", start, persistent=False)
            self.register_buffer(f"unit{number}", unit, persistent=False)
            self.shifts.append(nn.Parameter(torch.zeros_like(start)))

    def forward(self, x: Tensor) -> Tensor:
        """The input as it is: a model that is an nn.Sequential runs this module at its end."""
        return x

    def values(self, number: int) -> Tensor:
        """One part as it is now, before it is rounded to be stored."""
        start, unit = self.get_buffer(f"start{number}"), self.get_buffer(f"unit{number}")
        return self.parts[number].kind.constrained(start, start + self.shifts[number] * unit)

    def install(self, *_: object) -> None:
        """Have the packed weights decode with the parts as they would be stored, in float32."""
        for number, (packed, name, kind) in enumerate(self.parts):
            packed._buffers[name] = Rounded.apply(self.values(number), kind.store)

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the trained parts into the packed weights, rounded to their stored types."""
        for number, (packed, name, kind) in enumerate(self.parts):
            packed._buffers[name] = kind.store(self.values(number))


class Rounded(torch.autograd.Function):
    """Values as they are stored, in float32; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, store: Store) -> Tensor:
        return store(values).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


@contextmanager
def in_training(model: nn.Module, leftovers: RemainderTensors) -> Iterator[None]:
    """The model decodes with what is trained, and nothing but that, biases and norms has gradients."""
    weights = {id(site.weight(model)) for site in find_sites(model)}
    kept = [p for p in model.parameters() if id(p) in weights and p.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    model.add_module(LEFTOVERS, leftovers)
    hook = model.register_forward_pre_hook(leftovers.install)
    try:
        yield
    finally:
        hook.remove()
        del model._modules[LEFTOVERS]
        leftovers.write_back()
        for parameter in kept:
            parameter.requires_grad_(True)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """One parameter group of everything that has gradients, without weight decay."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.0}]
