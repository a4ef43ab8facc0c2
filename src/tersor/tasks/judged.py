"""Arrays, images and waves through any model, whatever it returns.

How the output is read (outputs.py) is settled on the first batch that a model is run on, which is the original's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.tasks.class_axis import find_class_axis
from tersor.tasks.contract import Output
from tersor.tasks.inputs import Batch, Inputs, scoring
from tersor.tasks.outputs import Reading, judged_names, tensors_of
from tersor.tasks.split import SEED, RowNumbers

LENGTH = 1e-3  # how far from 1 an embedding's length may be
OUTPUTS = ("logits", "embedding", "values")


@runtime_checkable
class Calls(Inputs, Protocol):
    """Inputs that a model can be called with."""

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch and return its output unchanged."""


@dataclass(frozen=True)
class Asked:
    """The options by which a user says how outputs are judged; None where the model is to show it.

    Attributes:
        output: `logits`, `embedding` or `values`.
        field: the one of several outputs that is judged, by name or number.
        class_axis: the axis of logits that holds the classes; 1 is the first after the examples.
    """

    output: Output | None = None
    field: str | None = None
    class_axis: int | None = None

    def __post_init__(self) -> None:
        if self.output is not None and self.output not in OUTPUTS:
            raise InputError(f"option output is {self.output!r}; expected one of {', '.join(OUTPUTS)}")
        if self.class_axis is not None and self.output not in (None, "logits"):
            raise InputError(f"option class_axis goes with output=logits, and output is {self.output}; leave one out")


@dataclass(eq=False)
class Judged:
    """Examples, and the reading of what a model makes of them once it has seen the first batch."""

    inputs: Calls
    asked: Asked = Asked()
    reading: Reading | None = None

    @property
    def output(self) -> Output:
        if self.reading is not None:
            return self.reading.output
        return self.asked.output or "logits"

    def __len__(self) -> int:
        return len(self.inputs)

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        return self.inputs.chunks(rows, batch_size)

    def batch(self, rows: RowNumbers) -> Batch:
        return self.inputs.batch(rows)

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch.

        A model that draws random numbers even in evaluation mode (a masked or variational autoencoder) gets the same
        ones in every call.
        """
        if model.training:
            return self.inputs.call(model, batch)
        state = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(SEED)
            return self.inputs.call(model, batch)
        finally:
            torch.default_generator.set_state(state)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits `[row, ..., class]`, or rows `[row, value]`."""
        output = self.call(model, batch)
        if self.reading is None:
            self.reading = choose_reading(model, batch, self.call, self.asked)
        return self.reading(output, batch.inputs.get("attention_mask"))


@torch.no_grad()
def choose_reading(model: nn.Module, batch: Batch, call: Callable[[nn.Module, Batch], Any], asked: Asked) -> Reading:
    """The `Reading` that suits this model's outputs, found by running it on one batch.

    Raises InputError for an output field that does not exist, or a class axis on which there are no classes.
    """
    with scoring(model):
        output = call(model, batch)
        names, kind = judged_names(output, len(batch.rows))
        found = tensors_of(output)
        if asked.field is not None:
            if asked.field not in found:
                raise InputError(f"option field is {asked.field}; the model returns {', '.join(found)}")
            names, kind = (asked.field,), None
        if asked.output == "logits" and len(names) > 1:
            raise InputError(f"the model returns {', '.join(names)}; say which are logits (option field={names[0]})")
        one = found[names[0]]
        if len(names) == 1 and (asked.output or kind) in (None, "logits"):
            return read_one(model, batch, call, asked, names[0], one, named=kind == "logits")
        kind = asked.output or kind or "values"
        if kind == "embedding":
            return Reading("embedding", names, note=f"embedding: {', '.join(names)}" if names != ("",) else "")
        return Reading("values", names, scales=scales_of([found[name] for name in names]), note=note_of(names))


def read_one(
    model: nn.Module,
    batch: Batch,
    call: Callable[[nn.Module, Batch], Any],
    asked: Asked,
    name: str,
    output: Tensor,
    named: bool,
) -> Reading:
    """The reading of one output tensor; `named` is true if its name says logits."""
    if asked.class_axis is not None:
        if not 1 <= asked.class_axis < output.ndim or output.shape[asked.class_axis] < 2:
            raise InputError(f"option class_axis is {asked.class_axis}, and the model returns {list(output.shape)}")
        return as_logits(name, output, asked.class_axis, "as asked")
    sure = named or asked.output == "logits"
    mask = batch.inputs.get("attention_mask")
    if output.ndim == 1 or (mask is not None and mask.shape == output.shape):
        return Reading("values", (name,), note=note_of((name,)))
    if output.ndim == 2:
        if not sure and is_unit(output):
            return Reading("embedding", (name,), note="rows of unit length: an embedding")
        return as_logits(name, output, 1, "") if output.shape[1] > 1 or sure else Reading("values", (name,))
    axis = find_class_axis(model, lambda: tensors_of(call(model, batch))[name], output)
    if axis is None and asked.output == "logits":
        raise InputError(
            f"the model returns {list(output.shape)}, and which axis holds the classes cannot be told; say it with "
            f"option class_axis (1 for [example, class, ...], {output.ndim - 1} for [example, ..., class])"
        )
    why = not_classes(batch, output, axis)
    if axis is None or (why and not sure):
        note = (
            f"{list(output.shape[1:])} judged as values, for {why}; option class_axis={axis or 1} if classes are there"
        )
        return Reading("values", (name,), note=note)
    return as_logits(name, output, axis, "")


def not_classes(batch: Batch, output: Tensor, axis: int | None) -> str:
    """The reason for which an output is taken to be numbers and not classes; empty if it may be classes."""
    if axis is None:
        return "no axis of classes was found"
    given = list(batch.inputs.values())
    alike = len(given) == 1 and given[0].ndim == output.ndim and given[0].shape[axis] == output.shape[axis]
    image = output.ndim > 3 and axis == 1
    return "it has the channels of the input" if alike and (image or given[0].shape == output.shape) else ""


def as_logits(name: str, output: Tensor, axis: int, why: str) -> Reading:
    """The `Reading` of an output as logits, or probabilities, with classes along `axis`."""
    last = output.movedim(axis, -1).float()
    sums = last.sum(-1)
    probabilities = bool((last >= 0).all() and (sums - 1).abs().max() < LENGTH) if last.numel() else False
    place = f"classes on axis {axis} of {list(output.shape[1:])}" if output.ndim > 2 else ""
    given = "probabilities, of which the logarithm is taken" if probabilities else ""
    note = ", ".join(filter(None, [place, why, given]))
    return Reading("logits", (name,), axis, probabilities=probabilities, note=note)


def is_unit(rows: Tensor) -> bool:
    """True if all rows have length 1, as normalized embeddings do."""
    lengths = rows.float().norm(dim=-1)
    return rows.shape[1] > 1 and bool(((lengths - 1).abs() < LENGTH).all()) and bool((rows < 0).any())


def scales_of(outputs: list[Tensor]) -> tuple[float, ...]:
    """Factors that make several outputs count alike: the root of each one's mean squared length; 1 for a single one."""
    if len(outputs) == 1:
        return (1.0,)
    lengths = [each.float().flatten(1).square().sum(1).mean().sqrt().item() for each in outputs]
    return tuple(length if 0 < length < float("inf") else 1.0 for length in lengths)


def note_of(names: tuple[str, ...]) -> str:
    """A sentence for the report: these outputs are judged as values."""
    return f"values: {', '.join(names)}" if names != ("",) else ""
