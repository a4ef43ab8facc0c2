"""Labels as people write them, as class numbers of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from tersor.core.errors import DataError

UNLABELLED = -1


@dataclass(frozen=True)
class Label:
    """A label as written, and where; `text` None for a calibration example without one."""

    text: str | None
    where: str


def class_numbers(
    labels: Sequence[Label], config: Any = None, *, numeric: bool = True
) -> tuple[Int[np.ndarray, " example"], str]:
    """Class numbers, and a note on how names became numbers.

    Whole numbers are taken as they are (`numeric`); names are looked up in the configuration's `label2id`, upper and
    lower case alike; names it does not all know are numbered in sorted order. -1 where there is no label.
    """
    names = sorted({label.text for label in labels if label.text is not None})
    if not names:
        raise DataError("no labels at all: give labelled data, or use --task fidelity")
    known = {str(name).lower(): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    if numeric and all(name.isascii() and name.isdigit() and len(name) < 10 for name in names):
        mapping, note = {name: int(name) for name in names}, ""
    elif all(name.lower() in known for name in names):
        mapping, note = {name: known[name.lower()] for name in names}, "labels by the model's label2id"
    else:
        mapping, note = {name: i for i, name in enumerate(names)}, f"labels in sorted order: {_shorten(names)}"
    _check_range(labels, mapping, getattr(config, "num_labels", None))
    numbers = [UNLABELLED if label.text is None else mapping[label.text] for label in labels]
    return np.array(numbers, dtype=np.int64), note


def _check_range(labels: Sequence[Label], mapping: dict[str, int], num_classes: int | None) -> None:
    if num_classes is None:
        return
    for label in labels:
        if label.text is not None and mapping[label.text] >= num_classes:
            raise DataError(
                f"{label.where}: label '{label.text}' is class {mapping[label.text]}, and the model has classes 0 to "
                f"{num_classes - 1}; number labels from 0 or name them as the model's label2id does"
            )


def _shorten(names: list[str]) -> str:
    shown = [f"{name}={i}" for i, name in enumerate(names)]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:5], f"... ({len(shown)} classes)"])
