"""The files that a task is opened from: its data, and the model's tokenizer and configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.core.errors import DataError


@dataclass(frozen=True)
class DataSource:
    """The files that a task is opened from.

    Attributes:
        data: file or folder; None only where a task has a fallback.
        calibration: a separate file or folder for calibration; None holds out a part of `train`, or else of `data`.
        train: a separate file or folder to train on, or None.
        tokenizer: the model's Hugging Face tokenizer, or None.
        config: the model's Hugging Face configuration, or None.
        model_folder: folder of the model (`1_Pooling/config.json` is read from it), or None.
    """

    data: Path | None = None
    calibration: Path | None = None
    tokenizer: Any = None
    config: Any = None
    model_folder: Path | None = None
    train: Path | None = None

    @property
    def train_name(self) -> str:
        """The name of the training data in tables; empty without it."""
        return "" if self.train is None else self.train.name

    @property
    def calibration_name(self) -> str:
        """The name of the separate calibration source in tables; empty without one."""
        return "" if self.calibration is None else self.calibration.name

    def need_data(self, task: str, expected: str) -> Path:
        """The data's path, or DataError saying what the task expects."""
        if self.data is None:
            raise DataError(f"task '{task}' needs data: {expected}")
        if not self.data.exists():
            raise DataError(f"{self.data}: no such file or folder; task '{task}' expects {expected}")
        if self.train is not None and not self.train.exists():
            raise DataError(f"{self.train}: no such file or folder to train on; task '{task}' expects {expected}")
        return self.data

    def need_tokenizer(self, what: str) -> Any:
        """The tokenizer, or DataError: text cannot be fed to a model without one."""
        if self.tokenizer is None:
            raise DataError(
                f"{what} is text, and this model has no tokenizer: put tokenizer.json into the model folder, give "
                f"arrays instead (.npz with x), or write your own task and name it package.module:factory"
            )
        return self.tokenizer
