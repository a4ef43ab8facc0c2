"""The teacher's outputs on the train split, computed once and kept on disk.

A folder of safetensors files, each holding some batches and written whole or not at all, so that a run that was killed
goes on where it was. For every row: how many predictions it has, and their outputs one after the other, either whole or
as the logits of the `top_k` most probable classes and one for all the rest (losses.top_and_tail).

    rows    int64 [row]                 which examples
    counts  int64 [row]                 predictions of each
    outputs float32 [prediction, class] or [prediction, top_k + 1]
    classes int32 [prediction, top_k]   only with top_k
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.progress import Progress, silent
from tersor.tasks.contract import TrainableTask
from tersor.tasks.inputs import Batch, scoring
from tersor.training.journal import write_whole
from tersor.training.losses import top_and_tail

BATCHES_A_FILE = 64


@dataclass(frozen=True)
class Answer:
    """A teacher's outputs for one batch.

    Attributes:
        outputs: logits or embeddings `[prediction, class]`; with `classes`, their logits and one for the rest.
        classes: `[prediction, top_k]`, or None where outputs are whole.
    """

    outputs: Float[Tensor, "prediction class_"]
    classes: Int[Tensor, "prediction top"] | None = None

    def to(self, device: torch.device) -> "Answer":
        return Answer(self.outputs.to(device), None if self.classes is None else self.classes.to(device))


def predictions(output: Tensor, batch: Any) -> Float[Tensor, "prediction class_"]:
    """One row a prediction, in the order of the batch: of every example, or of every token that is not padding."""
    if output.ndim == 2:
        return output
    mask = padding_mask(batch, output)
    return output.flatten(0, -2) if mask is None else output[mask]


def padding_mask(batch: Any, states: Tensor) -> Tensor | None:
    """True where `states [row, position, ...]` are of a token and not of padding; None where nothing is padded."""
    mask = batch.inputs.get("attention_mask") if isinstance(batch, Batch) else None
    if mask is None or mask.shape != states.shape[:2]:
        return None
    return mask.bool().to(states.device)


@dataclass
class TeacherCache:
    """A folder of a teacher's stored outputs, with an index of the rows in each file.

    Attributes:
        key: what the outputs depend on; files with another key are written anew.
        top_k: classes kept of a prediction; None, or as many as there are: all, as they came.
    """

    folder: Path
    key: str = ""
    top_k: int | None = None
    temperature: float = 1.0
    places: dict[int, tuple[Path, int, int]] = field(default_factory=dict)  # of a row: file, first prediction, how many
    files: dict[Path, Any] = field(default_factory=dict)

    def fill(self, task: TrainableTask, teacher: nn.Module, batch_size: int, progress: Progress = silent) -> None:
        """Run the teacher on what is not on disk yet. Raises InputError for batches that do not say their rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        batches, number, num_rows = task.epoch(0, batch_size), 0, 0
        while stretch := list(islice(batches, BATCHES_A_FILE)):
            path = self.folder / f"part-{number:05}.safetensors"
            if not self.index(path):
                self.write(path, task, teacher, stretch, progress, num_rows)
                self.index(path)
            number, num_rows = number + 1, num_rows + sum(len(batch.rows) for batch in stretch)
        progress("running the teacher", task.num_train, task.num_train)

    def write(
        self, path: Path, task: TrainableTask, teacher: nn.Module, batches: Sequence[Any], progress: Progress, done: int
    ) -> None:
        """Run the teacher on some batches, and keep what it says in one file."""
        rows: list[int] = []
        counts: list[int] = []
        answers: list[Answer] = []
        with scoring(teacher):
            for batch in batches:
                if not isinstance(batch, Batch):
                    raise InputError(f"cache: batches of task '{task.name}' do not say their rows; use cache: false")
                progress("running the teacher", min(done + len(rows), task.num_train), task.num_train)
                output = task.forward(teacher, batch)
                answers.append(self.answer(predictions(output, batch)).to(torch.device("cpu")))
                rows += batch.rows.tolist()
                counts += numbers_of_predictions(output, batch)
        tensors = {"outputs": torch.cat([answer.outputs for answer in answers])}
        tensors |= {"rows": torch.tensor(rows), "counts": torch.tensor(counts)}
        classes = [answer.classes.int() for answer in answers if answer.classes is not None]
        if classes:
            tensors["classes"] = torch.cat(classes)
        write_whole(tensors, path, {"key": self.key})

    def answer(self, outputs: Float[Tensor, "prediction class_"]) -> Answer:
        """The part of the teacher's outputs that is stored."""
        if self.top_k is None or self.top_k >= outputs.shape[-1]:
            return Answer(outputs.float())
        classes = outputs.topk(self.top_k, dim=-1).indices
        return Answer(top_and_tail(outputs, classes, self.temperature), classes)

    def index(self, path: Path) -> bool:
        """Note where the rows of a file lie; False where it is missing, damaged, or of another key."""
        if not path.is_file():
            return False
        try:
            file = safe_open(path, "pt")
            if (file.metadata() or {}).get("key") != self.key:
                return False
            rows, counts = file.get_tensor("rows").tolist(), file.get_tensor("counts").tolist()
        except (SafetensorError, OSError, ValueError):
            return False
        start = 0
        for row, count in zip(rows, counts, strict=True):
            self.places[row] = (path, start, count)
            start += count
        self.files[path] = file
        return True

    def read(self, batch: Batch) -> Answer:
        """The teacher's stored outputs for a batch, in the order of its rows."""
        outputs, classes = [], []
        for row in batch.rows.tolist():
            path, start, count = self.places[row]
            file = self.files[path]
            outputs.append(file.get_slice("outputs")[start : start + count])
            if "classes" in file.keys():  # noqa: SIM118
                classes.append(file.get_slice("classes")[start : start + count].long())
        return Answer(torch.cat(outputs), torch.cat(classes) if classes else None)


def numbers_of_predictions(output: Tensor, batch: Batch) -> list[int]:
    """The number of predictions in each row of a batch."""
    if output.ndim == 2:
        return [1] * len(output)
    mask = padding_mask(batch, output)
    return [output[0, ..., 0].numel()] * len(output) if mask is None else mask.sum(1).tolist()
