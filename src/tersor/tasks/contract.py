"""The contract of a task: data, how to run the model on it, and a score per example."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from tersor.tasks.scores import Scores

Split = Literal["calibration", "eval", "train"]
Output = Literal["logits", "embedding", "values"]


@runtime_checkable
class Task(Protocol):
    """Data, a forward pass and a score.

    A user's own task is any object with these members.

    Attributes:
        name: the name in tables and in `tersor.json`.
        output: what `forward` gives: `logits` `[..., class]`, `embedding` `[example, dim]` of unit length, or `values`.
            It fixes the loss whose curvature weighs compression errors (KL for logits, squared distance otherwise).
        description: one line saying what was read, how it was split, and the protocol (context, stride, pooling).
        fingerprint: hash of the data, kept in the artifact.
    """

    @property
    def name(self) -> str: ...

    @property
    def output(self) -> Output: ...

    @property
    def description(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def prepare(self, original: nn.Module) -> None:
        """See the original model once, before anything is changed (only `fidelity` needs it)."""

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Any]:
        """The split's batches, in a fixed order; `batch_size` None lets the task choose.

        No two splits share rows. tersor's own tasks give `Batch(rows, inputs)` (inputs.py), on the CPU.
        """

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model on one batch, on the model's device; differentiable, and leaves the training mode alone."""

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        """One row per example, in the order of the data; no gradients, in evaluation mode, which is then undone."""


@runtime_checkable
class TrainableTask(Task, Protocol):
    """A task that a model can be trained on.

    Attributes:
        num_train: examples of the train split; 0 where no training data was given.
    """

    @property
    def num_train(self) -> int: ...

    def epoch(self, seed: int, batch_size: int | None = None) -> Iterator[Any]:
        """The train split's batches once, in an order (and with augmentation) that depends on `seed` alone."""

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """The mean loss of a batch of the train split, a scalar, for what `forward` gave. Raises DataError where an
        example has no label."""
