"""Arrays from an `.npz` file, as a plain model takes them.

`x` and `y`, or `x_test` and `y_test`, are judged; `x_train` and `y_train`, if present, calibrate. uint8 is scaled to
[0, 1]; images `[example, height, width, 1 or 3]` become `[example, channel, height, width]`, and uint8 images without a
channel axis get one.
"""

import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tersor.core.errors import DataError
from tersor.core.messages import first_line
from tersor.tasks.contract import Output
from tersor.tasks.inputs import Batch, consecutive, device_of, float_type_of
from tersor.tasks.outputs import logits_of
from tersor.tasks.processor import Processor, read_processor
from tersor.tasks.source import DataSource
from tersor.tasks.split import RowNumbers

UNREADABLE = (  # what numpy and zipfile raise on damaged files
    *(OSError, ValueError, EOFError, TypeError, KeyError, AttributeError, RuntimeError, SyntaxError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)

Arrays = dict[str, np.ndarray]
Numbers = float | tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ArrayInputs:
    """Rows of one or more arrays of the same row shape (the data, then separate calibration rows).

    Kept as stored; scaled and normalised as `(x - mean) / std` batch by batch.
    """

    parts: tuple[Shaped[np.ndarray, " _ *shape"], ...]
    mean: Numbers = 0.0
    std: Numbers = 1.0
    processor: Processor | None = None

    @property
    def description(self) -> str:
        how = f", {self.processor.description}" if self.processor is not None else ""
        return f"shape {list(self.parts[0].shape[1:])}{how}"

    @property
    def output(self) -> Output:
        return "logits"

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        return consecutive(rows, batch_size)

    def batch(self, rows: RowNumbers) -> Batch:
        """`x [row, ...]`: float32, or int64 for arrays of token numbers."""
        pieces, start = [], 0
        for part in self.parts:
            inside = (rows >= start) & (rows < start + len(part))
            pieces.append(part[rows[inside] - start])
            start += len(part)
        stored = np.concatenate(pieces)
        if self.processor is not None:
            return Batch(rows, self.processor(list(as_images(stored))))
        return Batch(rows, {"x": normalise(to_model_layout(stored), self.mean, self.std)})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch."""
        return run_model(model, batch)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits as the model returns them."""
        return logits_of(self.call(model, batch))


def open_arrays(
    parts: tuple[np.ndarray, ...], source: DataSource, mean: Numbers | None = None, std: Numbers | None = None
) -> ArrayInputs:
    """Arrays as a model takes them. uint8 images go through the model's own image processor where it has one; other
    numbers are taken to be what the model wants already."""
    images = parts[0].dtype == np.uint8 and parts[0].ndim in (3, 4)
    processor = read_processor(source.model_folder, mean=mean, std=std) if images else None
    return ArrayInputs(parts, 0.0 if mean is None else mean, 1.0 if std is None else std, processor)


def as_images(x: np.ndarray) -> Shaped[np.ndarray, "row height width channel"]:
    """Images as uint8 with channels last, `[row, height, width, channel]`."""
    if x.ndim == 3:
        return x[..., None]
    return x if x.shape[-1] in (1, 3) else x.transpose(0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class NamedArrays:
    """Arrays that a model takes by name, one row of each an example: what models of several inputs need."""

    arrays: Arrays

    @property
    def output(self) -> Output:
        return "logits"

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        return consecutive(rows, batch_size)

    def batch(self, rows: RowNumbers) -> Batch:
        """Each array under its name: float32, or int64 for whole numbers."""
        return Batch(rows, {name: as_tensor(array[rows]) for name, array in self.arrays.items()})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch."""
        return run_model(model, batch)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits as the model returns them."""
        return logits_of(self.call(model, batch))


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Call a model with the batch's inputs by name, or with `x` as its only argument, in the model's own
    floating-point type. Raises DataError for what it cannot take."""
    kind = float_type_of(model)
    given = {name: x.to(kind) if x.is_floating_point() else x for name, x in batch.to(device_of(model)).items()}
    try:
        if given.keys() != {"x"}:
            return model(**given)
        name = getattr(model, "main_input_name", None)  # of transformers' models
        return model(**{name: given["x"]}) if isinstance(name, str) else model(given["x"])
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError) as error:
        sizes = ", ".join(f"{name} of shape {list(x.shape)}, {x.dtype}" for name, x in batch.inputs.items())
        what = f"{type(model).__name__} cannot take {sizes}"
        raise DataError(f"{what}: {first_line(error)}; check the data's axes and type") from error


def to_model_layout(x: Shaped[np.ndarray, " example *shape"]) -> Tensor:
    """Scale uint8 to [0, 1] and put channels first.

    >>> to_model_layout(np.full((2, 8, 8, 3), 255, np.uint8)).shape
    torch.Size([2, 3, 8, 8])
    """
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x)).float() / 255
    return as_tensor(x)


def as_tensor(x: np.ndarray) -> Tensor:
    """The array as a tensor: float32, or int64 for whole numbers."""
    kind = np.int64 if np.issubdtype(x.dtype, np.integer) else np.float32
    return torch.from_numpy(np.ascontiguousarray(x, dtype=kind))


def normalise(x: Tensor, mean: Numbers, std: Numbers) -> Tensor:
    """`(x - mean) / std`, one number for all or one per channel (axis 1)."""
    if (mean, std) == (0.0, 1.0):
        return x
    shift, scale = (torch.tensor(value, dtype=torch.float32).reshape(-1) for value in (mean, std))
    for what, value in (("mean", shift), ("std", scale)):
        if len(value) not in (1, x.shape[1]):
            raise DataError(f"{what} has {len(value)} numbers; expected 1 or one per channel ({x.shape[1]})")
    shape = (-1,) + (1,) * (x.ndim - 2)
    return (x.float() - shift.reshape(shape)) / scale.reshape(shape)


def read_npz(path: Path) -> Arrays:
    """The arrays of an `.npz` file; never unpickles."""
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.ndarray):
                return {name: member(path, name, file[name]) for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise DataError(
            f"{path}: not a readable .npz of plain arrays ({error}); write it with np.savez(path, x=x, y=y), where no "
            f"array holds Python objects"
        ) from None
    raise DataError(f"{path}: one bare array; expected .npz with x and y (np.savez(path, x=x, y=y))")


def member(path: Path, name: str, value: object) -> np.ndarray:
    """One member of the archive. Raises DataError for bytes that are no array."""
    if not isinstance(value, np.ndarray):
        raise DataError(f"{path}: '{name}' is no array; write the file with np.savez(path, x=x, y=y)")
    return value


def examples(path: Path, arrays: Arrays, name: str) -> Shaped[np.ndarray, " example *shape"]:
    """One input array, checked: `[example, ...]`, not empty, numbers, finite."""
    x = arrays[name]
    if x.ndim < 2 or not x.size:
        raise DataError(
            f"{path}: '{name}' has shape {list(x.shape)}; expected [example, ...] with at least one example"
        )
    if x.dtype.kind not in "biuf":
        raise DataError(f"{path}: '{name}' is of type {x.dtype}; expected numbers")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"{path}: '{name}' holds NaN or infinity at index {np.argwhere(~np.isfinite(x))[0].tolist()}")
    return x


def find_name(path: Path, arrays: Arrays, wanted: tuple[str, ...]) -> str:
    """The first of the `wanted` names that the file holds. Raises DataError if it holds none."""
    for name in wanted:
        if name in arrays:
            return name
    raise DataError(f"{path}: no array named {' or '.join(wanted)}; it holds {', '.join(arrays) or 'nothing'}")


def check_same_shape(path: Path, parts: tuple[np.ndarray, ...]) -> None:
    """Raise DataError unless calibration rows have the shape of the evaluation rows."""
    kinds = {(part.shape[1:], part.dtype == np.uint8) for part in parts}
    if len(kinds) > 1:
        found = " and ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        raise DataError(f"{path}: rows for evaluation and calibration differ: {found}; expected one shape and type")
