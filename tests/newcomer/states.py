"""The first hidden state of a model that reads token ids, `[row, token]` in an `.npz` file: how far does it move?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersor.tasks.contract import Output, Split
from tersor.tasks.inputs import Batch, consecutive, scoring
from tersor.tasks.scores import METRICS, Scores
from tersor.tasks.source import DataSource


@dataclass(frozen=True, eq=False)
class States:
    """Mean of the hidden state, a number for each row of ids."""

    ids: np.ndarray
    description: str
    batch_size: int = 8
    name: str = "states"
    output: Output = "values"
    fingerprint: str = "made for a test"

    def prepare(self, original: nn.Module) -> None:
        """Nothing to see."""

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Batch]:
        half = len(self.ids) // 2
        rows = np.arange(half) if split == "calibration" else np.arange(half, len(self.ids))
        for chunk in consecutive(rows, batch_size or self.batch_size):
            yield Batch(chunk, {"input_ids": torch.from_numpy(self.ids[chunk])})

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        output: Tensor = model(**batch.inputs).last_hidden_state[:, 0]
        return output

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        with scoring(model):
            rows = torch.cat([self.forward(model, batch).double().mean(1) for batch in self.batches(split)])
        return Scores(METRICS["mean"], rows.unsqueeze(1).numpy())


def open_states(source: DataSource, *, batch_size: int = 8) -> States:
    """Raises DataError where there is no data."""
    path = source.need_data("states", "an .npz file with ids")
    return States(np.load(path)["ids"], f"{path.name}: half to calibrate on, half to judge", batch_size)
