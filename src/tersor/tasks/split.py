"""Splits rows into calibration and evaluation, which never share a row.

Rows are numbered through: the data's first, then those of a separate calibration source. Choices are seeded, so the
same data always splits the same way.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from tersor.core.errors import DataError, InputError
from tersor.tasks.contract import Split

SEED = 0
SPLITS = ("calibration", "eval", "train")
RowNumbers = Int[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The splits, as row numbers, and the sentence that describes them."""

    calibration: RowNumbers
    eval: RowNumbers
    description: str
    train: RowNumbers = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __getitem__(self, split: Split) -> RowNumbers:
        if split not in SPLITS:
            raise InputError(f"unknown split '{split}': expected {' or '.join(map(repr, SPLITS))}")
        return getattr(self, split)


def choose(num: int, wanted: int) -> RowNumbers:
    """`wanted` of `num` rows at random, in ascending order; all when there are no more.

    >>> choose(5, 9)
    array([0, 1, 2, 3, 4])
    """
    if wanted >= num:
        return np.arange(num, dtype=np.int64)
    return np.sort(np.random.default_rng(SEED).choice(num, wanted, replace=False)).astype(np.int64)


def split_rows(
    num: int,
    num_separate: int = 0,
    num_train: int = 0,
    *,
    calibration_examples: int,
    max_examples: int | None = None,
    unit: str = "rows",
    separate: str = "",
    train_name: str = "",
) -> Rows:
    """Split `num` rows of data, followed by `num_separate` rows read from a calibration source named `separate`, and
    by `num_train` rows of training data named `train_name`.

    Without separate rows, `calibration_examples` are held out: at most half of the training data, or where there is
    none 10 % of the data, at least one. `max_examples` keeps a random subset for evaluation.
    """
    first = num + num_separate
    train = np.arange(first, first + num_train, dtype=np.int64)
    if num_separate:
        calibration = num + choose(num_separate, calibration_examples)
        judged = np.arange(num, dtype=np.int64)
        of = f" of {num_separate:,}" if len(calibration) < num_separate else ""
        tail = f"{len(calibration):,}{of} {unit} from {separate} for calibration"
    elif num_train > 1:
        calibration = train[choose(num_train, min(calibration_examples, num_train // 2))]
        train = np.setdiff1d(train, calibration)
        judged = np.arange(num, dtype=np.int64)
        tail = f"{len(calibration):,} held out of {train_name} for calibration"
    else:
        if num < 2:
            raise DataError(f"{num} {unit} cannot be split: give at least 2, or a separate calibration file")
        calibration = choose(num, min(calibration_examples, max(1, num // 10)))
        judged = np.setdiff1d(np.arange(num, dtype=np.int64), calibration)
        tail = f"{len(calibration):,} held out for calibration"
    if max_examples is not None and max_examples < len(judged):
        head = f"{max_examples:,} of {len(judged):,} {unit} for evaluation"
        judged = judged[choose(len(judged), max_examples)]
    else:
        head = f"{len(judged):,} {unit} for evaluation"
    trained = f", {len(train):,} of {train_name} for training" if len(train) else ""
    return Rows(calibration, judged, f"{head}, {tail}{trained}", train)
