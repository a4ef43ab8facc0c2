"""Settings of every step that trains: length, learning rate, optimizer."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tersor.core.errors import DataError
from tersor.nn.sites import check_patterns, find_sites
from tersor.steps.preview import Preview
from tersor.tasks.contract import Task, TrainableTask


class TrainingStep(BaseModel):
    """The fields that all training steps share; field = recipe key.

    Attributes:
        epochs: passes over the train split; a fraction is allowed.
        num_steps: optimizer steps; where given, `epochs` does not count.
        batch_size: examples of one forward pass.
        accumulate: forward passes whose gradients make one optimizer step.
        learning_rate: at its peak, after `warmup`.
        warmup: the fraction of the steps in which the learning rate rises from 0.
        schedule: how it falls after that: `cosine` and `linear` to 0, `constant` not at all.
        weight_decay: of matrices; biases and norms have none.
        clip_norm: gradients longer than this are shortened to it; None: never.
        precision: of the forward pass; weights and optimizer states stay as the model has them.
        gradient_checkpointing: activations are computed twice instead of kept (Hugging Face models).
        num_evaluations: how often, evenly over the steps, the held-out calibration split is scored.
        patience: evaluations without a better score after which training stops, and the best weights are taken back;
            None: it never stops early, and the last weights are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(default=3, gt=0)
    num_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "sgd", "adamw-8bit"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    gradient_checkpointing: bool = False
    num_evaluations: int = Field(default=5, ge=0)
    patience: int | None = Field(default=None, ge=1)

    def run(self, job: Any) -> None:
        """Train the model of a `Job` (job.py)."""
        raise NotImplementedError

    def check(self, preview: Preview) -> None:
        """Before any work: the patterns match sites, and the task can be trained on. Raises UnknownName, DataError."""
        check_patterns(self.patterns, find_sites(preview.model))
        if preview.is_whole:
            check_trainable(preview.task, self.step)  # type: ignore[attr-defined]

    @property
    def patterns(self) -> tuple[str, ...]:
        """The site patterns that the step names; they are checked before anything runs."""
        return ()


def check_trainable(task: Task | None, name: str) -> TrainableTask:
    """The task, if it has something to train on. Raises DataError with the way out."""
    if task is None or not isinstance(task, TrainableTask):
        what = "no task" if task is None else f"task '{task.name}'"
        raise DataError(f"{name}: {what} has no train split; a task that trains has num_train, epoch and loss")
    if not task.num_train:
        raise DataError(f"{name}: {task.name} was given no training data; add --train FILE")
    return task
