"""Which rows calibrate and which rows judge: never the same ones.

Rows are numbered through: the data's first, then those of a separate calibration source. Choices are seeded, so the
same data always splits the same way.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tersor.errors import DataError, InputError
from tersor.tasks.contract import Split

SEED = 0
RowNumbers = Int[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The two splits, as row numbers, and the sentence that describes them."""

    calibration: RowNumbers
    eval: RowNumbers
    description: str

    def __getitem__(self, split: Split) -> RowNumbers:
        if split not in ("calibration", "eval"):
            raise InputError(f"unknown split '{split}': expected 'calibration' or 'eval'")
        return self.calibration if split == "calibration" else self.eval


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
    *,
    calibration_examples: int,
    max_examples: int | None = None,
    unit: str = "rows",
    separate: str = "",
) -> Rows:
    """Split `num` rows of data, followed by `num_separate` rows read from a calibration source named `separate`.

    Without separate rows, min(`calibration_examples`, 10 %) of the data, at least one, is held out. `max_examples`
    keeps a random subset for evaluation.
    """
    if num_separate:
        calibration = num + choose(num_separate, calibration_examples)
        judged = np.arange(num, dtype=np.int64)
        of = f" of {num_separate:,}" if len(calibration) < num_separate else ""
        tail = f"{len(calibration):,}{of} {unit} from {separate} for calibration"
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
    return Rows(calibration, judged, f"{head}, {tail}")
