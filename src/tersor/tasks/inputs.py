"""Examples and how a model runs on them: what all tasks share, whatever they score."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.tasks.contract import Output
from tersor.tasks.split import RowNumbers


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, ready for the model.

    Attributes:
        rows: numbers of the examples, `[row]`.
        inputs: the model's arguments by name, each `[row, ...]`, on the CPU.
    """

    rows: RowNumbers
    inputs: dict[str, Tensor]

    def to(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self.inputs.items()}


@runtime_checkable
class Inputs(Protocol):
    """Numbered examples of one kind (texts, token windows, arrays, image files)."""

    @property
    def output(self) -> Output: ...

    def __len__(self) -> int: ...

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        """The rows of each batch, in the order they are run."""

    def batch(self, rows: RowNumbers) -> Batch:
        """The examples of these rows as tensors."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model on a batch and return the output that is scored; differentiable."""


def batches(inputs: Inputs, rows: RowNumbers, batch_size: int) -> Iterator[Batch]:
    """The rows as batches, in an order that depends on nothing but the arguments."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected 1 or more")
    for chunk in inputs.chunks(rows, batch_size):
        yield inputs.batch(chunk)


MIXED = 64  # batches among which texts of like length are put together in training


def epoch(inputs: Inputs, rows: RowNumbers, batch_size: int, seed: int) -> Iterator[Batch]:
    """All rows once, as batches in an order drawn from `seed`."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected 1 or more")
    order = np.random.default_rng(seed).permutation(rows)
    for part in consecutive(order, MIXED * batch_size):
        for chunk in inputs.chunks(part, batch_size):
            yield inputs.batch(chunk)


def consecutive(rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
    """Rows in the order given, `batch_size` at a time."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode; every module's own training flag is restored afterwards."""
    flags = [(weakref.ref(module), module.training) for module in model.modules()]  # some may be replaced inside
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for reference, training in flags:
            module = reference()
            if module is not None:
                module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer that holds numbers; the CPU for a model with neither."""
    tensor = next((t for t in chain(model.parameters(), model.buffers()) if not t.is_meta), None)
    return torch.device("cpu") if tensor is None else tensor.device


def float_type_of(model: nn.Module) -> torch.dtype:
    """The type of the first floating-point parameter; float32 for a model without any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def scatter(pieces: list[tuple[RowNumbers, np.ndarray]], rows: RowNumbers) -> np.ndarray:
    """Per-batch results `[row, ...]` put back in the order of `rows`."""
    numbers = np.concatenate([piece_rows for piece_rows, _ in pieces])
    values = np.concatenate([values for _, values in pieces])
    order = np.argsort(numbers, kind="stable")
    return values[order][np.searchsorted(numbers[order], rows)]
