"""Train what is continuous in a packed model, and nothing else: scales, zero points, biases, norms.

The second phase of EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062), here taught by the original's
outputs. Codes stay as they are, so the file keeps its size and its format, and a few hundred steps are enough. Works
for every format that decodes with some numbers that are no codes: the table CONTINUOUS.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.formats.codebook import Codebook
from tersor.formats.coded import LARGEST, Coded, finer
from tersor.formats.contract import Format
from tersor.formats.fp8 import Fp8
from tersor.formats.int_group import IntGroup
from tersor.formats.k_quant import KQuant
from tersor.formats.lowrank import Corrected, LowRank
from tersor.formats.mx import Nvfp4
from tersor.formats.nf4 import Nf4, Nf4Double
from tersor.formats.sparse_int import SparseInt
from tersor.nn.packed import PackedWeight, packed_weight
from tersor.nn.sites import find_sites
from tersor.tasks.inputs import device_of
from tersor.training.imitation import imitation
from tersor.training.job import Job
from tersor.training.loop import check_trainable, train
from tersor.training.norms import Norms
from tersor.training.settings import TrainingStep

LEFTOVERS = "leftovers"  # the module that holds what is trained, in the model


def half(values: Tensor) -> Tensor:
    """Round to fp16, as stored."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half()


def byte(values: Tensor) -> Tensor:
    """Round to whole numbers from 0 to 255, as stored."""
    return values.round().clamp(0, 255).to(torch.uint8)


def bfloat(values: Tensor) -> Tensor:
    """Round to bfloat16, as stored."""
    return values.bfloat16()


def e4m3(values: Tensor) -> Tensor:
    """Round to FP8 E4M3, not negative, as stored."""
    return values.clamp(0, torch.finfo(torch.float8_e4m3fn).max).to(torch.float8_e4m3fn)


def single(values: Tensor) -> Tensor:
    """Cast to float32, as stored."""
    return values.clone()


def ascending(values: Tensor) -> Tensor:
    """Round to fp16, each at least the one before it."""
    return half(values).cummax(-1).values


def exponent(values: Tensor) -> Tensor:
    """Round to whole exponents."""
    return values.round().clamp(-LARGEST, LARGEST).to(torch.int16)


Store = Callable[[Tensor], Tensor]  # float32 to what is stored
CONTINUOUS: dict[type[Format], dict[str, Store]] = {
    IntGroup: {"scale": half, "zero_point": byte},
    SparseInt: {"scale": half},
    Fp8: {"scale": bfloat},
    Nf4: {"absmax": single},
    Nf4Double: {"nested_absmax": single, "offset": single},
    Nvfp4: {"scale": e4m3},
    KQuant: {"scale": half, "minimum": half},
    Codebook: {"codebook": ascending},
    Coded: {"row": exponent, "column": exponent},
    LowRank: {"left": half, "right": half},
    Corrected: {"scale": half, "left": half, "right": half},
}


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
        refine_exponents(job.model)
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
    """A continuous part of a packed weight, and how it is stored."""

    packed: PackedWeight
    name: str
    store: Store


def parts_of(model: nn.Module) -> Iterator[Part]:
    """The continuous parts of every packed weight, tied ones once."""
    for site in find_sites(model):
        packed = packed_weight(model.get_submodule(site.owners[0].module), site.owners[0].parameter)
        stores = CONTINUOUS.get(type(packed.format), {}) if packed is not None else {}
        for name, store in stores.items():
            if packed is not None and name in packed.tensors:
                yield Part(packed, name, store)


FINER = 8  # times: as fine as the exponents of scales become before they are trained, 0.5 % instead of 4 %


def refine_exponents(model: nn.Module) -> None:
    """Have the scales of `coded` weights take small steps, which costs a few bits for every row and column."""
    for site in find_sites(model):
        packed = packed_weight(model.get_submodule(site.owners[0].module), site.owners[0].parameter)
        if packed is not None and isinstance(packed.format, Coded):
            packed._buffers.update(finer(packed.tensors, FINER))


def size_of_part(part: Part) -> Tensor:
    """By how much a part changes at a shift of one: the root mean square of a row, so that one learning rate suits all
    parts; of exponents, what changes the scale by that share of itself."""
    if isinstance(part.packed.format, Coded):
        octave = part.packed.tensors["scale"][:, 1 if part.name == "row" else 2].unsqueeze(1)
        return 1 / (octave * math.log(2))
    return part.packed.tensors[part.name].float().square().mean(-1, keepdim=True).sqrt()


class RemainderTensors(nn.Module):
    """Float32 copies of continuous parts: `start + shift * size`, where only the shifts are trained."""

    def __init__(self, parts: Iterator[Part]):
        super().__init__()
        self.parts = list(parts)
        self.shifts = nn.ParameterList()
        for number, part in enumerate(self.parts):
            start = part.packed.tensors[part.name].float()
            self.register_buffer(f"start{number}", start, persistent=False)
            self.register_buffer(f"size{number}", size_of_part(part), persistent=False)
            self.shifts.append(nn.Parameter(torch.zeros_like(start)))

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: a model that is an nn.Sequential runs this module at its end."""
        return x

    def values(self, number: int) -> Tensor:
        """One part as it is now, before it is rounded to be stored. Zero in a codebook is what pruned weights share: it
        stays, and the other values stay on their side of it."""
        start, size = self.get_buffer(f"start{number}"), self.get_buffer(f"size{number}")
        values = start + self.shifts[number] * size
        if not isinstance(self.parts[number].packed.format, Codebook):
            return values
        pruned = (start == 0).any(-1, keepdim=True)
        return torch.where(pruned & (values * start <= 0), torch.zeros_like(start), values)

    def install(self, *_: object) -> None:
        """Have the packed weights decode with the parts as they would be stored, in float32."""
        for number, (packed, name, store) in enumerate(self.parts):
            packed._buffers[name] = Rounded.apply(self.values(number), store)

    @torch.no_grad()
    def settle(self) -> None:
        """Store the parts for good."""
        for number, (packed, name, store) in enumerate(self.parts):
            packed._buffers[name] = store(self.values(number))


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
        leftovers.settle()
        for parameter in kept:
            parameter.requires_grad_(True)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Everything that has gradients, without weight decay."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.0}]
