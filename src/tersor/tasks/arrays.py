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

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tersor.errors import DataError
from tersor.tasks.contract import Output
from tersor.tasks.inputs import Batch, consecutive, device_of, float_type_of, logits_of
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
        return Batch(rows, {"x": normalise(to_model_layout(np.concatenate(pieces)), self.mean, self.std)})

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits `[row, ..., class]`."""
        return run_array(model, batch)


def run_array(model: nn.Module, batch: Batch) -> Tensor:
    """Call a model with `x` as its only argument, in the model's own floating-point type."""
    x = batch.inputs["x"].to(device_of(model))
    try:
        output = model(x.to(float_type_of(model)) if x.is_floating_point() else x)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        what = f"{type(model).__name__} cannot take x of shape {list(x.shape)}, {x.dtype}"
        raise DataError(f"{what}: {str(error).strip().splitlines()[0]}; check the data's axes and type") from error
    return logits_of(output)


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
                return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise DataError(
            f"{path}: not a readable .npz of plain arrays ({error}); write it with np.savez(path, x=x, y=y), where no "
            f"array holds Python objects"
        ) from None
    raise DataError(f"{path}: one bare array; expected .npz with x and y (np.savez(path, x=x, y=y))")


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
    """The first of some names that the file holds."""
    for name in wanted:
        if name in arrays:
            return name
    raise DataError(f"{path}: no array named {' or '.join(wanted)}; it holds {', '.join(arrays) or 'nothing'}")


def check_same_shape(path: Path, parts: tuple[np.ndarray, ...]) -> None:
    """Calibration rows must look like the rows that are judged."""
    kinds = {(part.shape[1:], part.dtype == np.uint8) for part in parts}
    if len(kinds) > 1:
        found = " and ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        raise DataError(f"{path}: rows for evaluation and calibration differ: {found}; expected one shape and type")
