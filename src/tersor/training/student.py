"""A student made from its teacher: some of its layers, and of each some of its dimensions.

Layers: every k-th, the first and the last among them (Sanh et al. 2019, DistilBERT, https://arxiv.org/abs/1910.01108).
Width: weight selection, evenly spaced elements of every axis (Xu et al. 2023, https://arxiv.org/abs/2311.18823), the
same ones wherever an axis is the residual stream, and whole heads with their queries, keys, values and outputs. Both
start far better than random weights and far worse than the teacher: distil afterwards.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from tersor.calibration.blocks import find_blocks
from tersor.core.errors import InputError
from tersor.nn.packed import Stored
from tersor.steps.preview import Preview
from tersor.training.architectures import PER_LAYER, Architecture, architecture_of
from tersor.training.job import Job

PACKED = "step student stands after a weights step, whose packed weights cannot be cut; put it before"


class StudentStep(BaseModel):
    """Recipe step `student`: go on with a smaller model cut from this one, which becomes the teacher.

    Attributes:
        layers: how many, spread evenly, or which, counted from 0; None: all.
        width: hidden size, heads and intermediate size times this.
        hidden, intermediate, num_heads: these sizes instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["student"] = "student"
    layers: int | tuple[int, ...] | None = None
    width: float | None = Field(default=None, gt=0, le=1)
    hidden: int | None = Field(default=None, ge=1)
    intermediate: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)

    @field_validator("layers")
    @classmethod
    def layers_count(cls, layers: Any) -> Any:
        chosen = (layers,) if isinstance(layers, int) else layers
        if chosen is not None and (not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or layers == 0):
            raise ValueError(f"layers is {layers}; expected a number from 1, or layer numbers from 0 in rising order")
        return layers

    @model_validator(mode="after")
    def smaller_somehow(self) -> "StudentStep":
        if not any((self.layers, self.width, self.hidden, self.intermediate, self.num_heads)):
            raise ValueError("a student is smaller: give layers, width, hidden, intermediate or num_heads")
        return self

    def check(self, preview: Preview) -> None:
        """Go on with the shapes of the student. Raises what `make_student` raises, and InputError after a step that
        prunes or packs."""
        if preview.pruned:
            raise InputError("step student stands after a step that prunes, whose masks fit the teacher; put it before")
        if preview.packed:
            raise InputError(PACKED)
        preview.model = make_student(preview.model, self, weights=False)

    def run(self, job: Job) -> None:
        """Put the student in the teacher's place. Raises what `make_student` raises."""
        job.teacher, job.model = job.model, make_student(job.model, self)


def make_student(teacher: nn.Module, step: StudentStep, *, weights: bool = True) -> PreTrainedModel:
    """A smaller model of the same class, in eval mode, that shares nothing with its teacher.

    Args:
        weights: copy them; without, the student lies on the meta device and has shapes alone.

    Raises:
        InputError: for a model whose architecture the table does not have, and sizes that do not fit it.
    """
    names = architecture_of(teacher, "student")
    if not isinstance(teacher, PreTrainedModel):
        raise InputError(f"student knows Hugging Face models, and {type(teacher).__name__} is none")
    if any(isinstance(module, Stored) for module in teacher.modules()):
        raise InputError(PACKED)
    blocks = find_blocks(teacher)
    num_layers = getattr(teacher.config, names.num_layers)
    layers = chosen_layers(step.layers, num_layers)
    config = smaller_config(teacher.config, names, step, layers)
    if not weights:
        with torch.device("meta"):
            return type(teacher)._from_config(config).eval()
    with no_init_weights():
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    student.tie_weights()
    cut = Cut.of(teacher.config, config, names)
    stack = re.escape(blocks[0].rpartition(".")[0]) if blocks else ""
    state = teacher.state_dict()
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            inside = re.match(rf"({stack})\.(\d+)\.(.+)", name) if stack else None
            place = f"{inside[1]}.{layers[int(inside[2])]}.{inside[3]}" if inside else name
            tensor.copy_(cut.select(name, inside[3] if inside else "", state[place], tensor.shape))
    if student.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def evenly(num: int, chosen: int) -> list[int]:
    """`chosen` of `num` places, the first and the last among them.

    >>> evenly(6, 3), evenly(12, 6), evenly(4, 1)
    ([0, 2, 5], [0, 2, 4, 7, 9, 11], [0])
    """
    return [round(place * (num - 1) / max(chosen - 1, 1)) for place in range(chosen)]


def chosen_layers(layers: int | Sequence[int] | None, num_layers: int) -> list[int]:
    """Numbers of the teacher's layers, rising. Raises InputError for layers that it does not have."""
    if layers is None:
        return list(range(num_layers))
    most = layers if isinstance(layers, int) else max(layers) + 1
    if most > num_layers:
        which = f"{layers} layers" if isinstance(layers, int) else f"layer {most - 1}"
        raise InputError(
            f"layers: the teacher has {num_layers} (0 to {num_layers - 1}), and the student asks for {which}"
        )
    return evenly(num_layers, layers) if isinstance(layers, int) else list(layers)


def smaller_config(config: Any, names: Architecture, step: StudentStep, layers: Sequence[int]) -> Any:
    """The student's configuration. Raises InputError for sizes that are not whole or do not fit each other."""
    smaller = copy.deepcopy(config)
    for name in PER_LAYER:
        if getattr(config, name, None):
            setattr(smaller, name, [getattr(config, name)[layer] for layer in layers])
    setattr(smaller, names.num_layers, len(layers))
    if not any((step.width, step.hidden, step.intermediate, step.num_heads)):
        return smaller
    if names.attention is None:
        raise InputError(f"width: {config.model_type} keeps queries, keys and values in one matrix; cut layers alone")
    hidden, num_heads, intermediate = (getattr(config, n) for n in (names.hidden, names.num_heads, names.intermediate))
    width = step.width or (step.hidden / hidden if step.hidden else 1.0)
    sizes = {
        names.hidden: step.hidden or whole(hidden * width, names.hidden, hidden),
        names.num_heads: step.num_heads or whole(num_heads * width, names.num_heads, num_heads),
        names.intermediate: step.intermediate or round(intermediate * width),
    }
    for name, size in sizes.items():
        if size > getattr(config, name):
            raise InputError(
                f"{name} is {getattr(config, name)}, and the student asks for {size}; a student is smaller"
            )
        setattr(smaller, name, size)
    head_dim = head_dim_of(config, names)
    if names.num_kv_heads:
        group = num_heads // getattr(config, names.num_kv_heads)
        if sizes[names.num_heads] % group:
            raise InputError(
                f"num_heads is {sizes[names.num_heads]}, and {group} heads of queries share one of keys; take a "
                f"multiple of {group}"
            )
        setattr(smaller, names.num_kv_heads, sizes[names.num_heads] // group)
    if names.head_dim:
        setattr(smaller, names.head_dim, head_dim)
    elif sizes[names.hidden] % sizes[names.num_heads]:
        raise InputError(
            f"{names.hidden} is {sizes[names.hidden]}, and {sizes[names.num_heads]} heads do not divide it; give "
            f"num_heads as well"
        )
    if head_dim_of(smaller, names) > head_dim:
        raise InputError(
            f"heads of {head_dim} dimensions would become heads of {head_dim_of(smaller, names)}; a narrower student "
            f"needs fewer dimensions a head or more heads"
        )
    return smaller


def whole(size: float, name: str, before: int) -> int:
    """A size that came out whole. Raises InputError with the nearest widths that give one."""
    if abs(size - round(size)) > 1e-6 or round(size) < 1:
        near = sorted({max(1, int(size)), int(size) + 1})
        widths = " or ".join(f"{number / before:.4g}" for number in near)
        raise InputError(f"{name} is {before}, and would become {size:g}; take width {widths}, or give the sizes")
    return round(size)


def head_dim_of(config: Any, names: Architecture) -> int:
    """Dimensions of a head."""
    own = getattr(config, names.head_dim, None) if names.head_dim else None
    return own or getattr(config, names.hidden) // getattr(config, names.num_heads)


@dataclass(frozen=True)
class Cut:
    """The elements of each axis of the teacher's tensors that the student keeps.

    Attributes:
        by_size: of axes by their sizes in teacher and student.
        by_place: of the axis of a layer inside a block: (name, axis).
    """

    by_size: dict[tuple[int, int], list[int]]
    by_place: dict[tuple[str, int], list[int]]

    @classmethod
    def of(cls, teacher: Any, student: Any, names: Architecture) -> "Cut":
        sizes = [
            [getattr(config, name) for config in (teacher, student)] for name in (names.intermediate, names.hidden)
        ]
        by_size = {(before, after): evenly(before, after) for before, after in sizes if before is not None}
        if names.attention is None:
            return cls(by_size, {})
        field = names.num_kv_heads or names.num_heads
        kv_heads, kept = (getattr(config, field) for config in (teacher, student))
        group = getattr(teacher, names.num_heads) // kv_heads
        heads = evenly(kv_heads, kept)
        dims = evenly(head_dim_of(teacher, names), head_dim_of(student, names))
        size = head_dim_of(teacher, names)
        keys = [head * size + dim for head in heads for dim in dims]
        kept_heads = [head * group + one for head in heads for one in range(group)]
        queries = [head * size + dim for head in kept_heads for dim in dims]
        by_size.setdefault((kv_heads * group, len(kept_heads)), kept_heads)  # one value a head, such as a bias
        attention = names.attention
        by_place = {(attention.query, 0): queries, (attention.output, 1): queries}
        return cls(by_size, by_place | {(attention.key, 0): keys, (attention.value, 0): keys})

    def select(self, name: str, inside: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The student's part of a tensor; `inside` is its name in its block. Raises InputError for an axis that the
        table cannot explain."""
        layer = inside.rpartition(".")[0]
        for axis, (before, after) in enumerate(zip(tensor.shape, shape, strict=True)):
            if before == after:
                continue
            kept = self.by_place.get((layer, axis), self.by_size.get((before, after)))
            if kept is None or len(kept) != after:
                raise InputError(
                    f"student: {name} {list(tensor.shape)} should become {list(shape)}, and nothing says how"
                )
            tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
        return tensor
