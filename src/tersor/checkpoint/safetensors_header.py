"""Safetensors files one tensor at a time, by plain reads and writes: a mapped file would count as memory whole."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from tersor.core.errors import ArtifactError, ModelError
from tersor.core.messages import first_line
from tersor.core.weights_file import DTYPE_NAMES, METADATA, bytes_of, header, in_file_order

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK = 2**24  # bytes copied at a time


class OnDisk(Protocol):
    """A tensor that is not in memory."""

    @property
    def path(self) -> Path: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Tensor: ...

    def copy_to(self, target: BinaryIO) -> None: ...


@dataclass(frozen=True)
class TensorSpan:
    """The place of a tensor's bytes in a file."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor. Raises ModelError if the file ends before it does."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                num_read = file.readinto(bytes_of(tensor))
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read ({error.strerror})") from None
        if num_read != self.num_bytes:
            raise ModelError(f"{self.path}: ends inside a tensor; download or save it again")
        return tensor

    def copy_to(self, target: BinaryIO) -> None:
        """Append the bytes to an open file."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.num_bytes
            while left:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    raise ModelError(f"{self.path}: ends inside a tensor; download or save it again")
                target.write(piece)
                left -= len(piece)


class SpanTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, spans: Mapping[str, OnDisk]):
        self.spans = spans

    def __getitem__(self, name: str) -> Tensor:
        return self.spans[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """The place of each tensor in a safetensors file. Raises ModelError for a damaged file."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > num_bytes:
                raise ValueError("the header is longer than the file")
            entries = json.loads(file.read(length))
        found = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                span = TensorSpan(path, 8 + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if begin < 0 or end - begin != span.num_bytes or 8 + length + end > num_bytes:
                    raise ValueError(f"{name} does not fit its place")
                found[name] = span
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = first_line(error)
        raise ModelError(f"{path}: not a whole safetensors file ({problem}); download or save it again") from None


@dataclass
class Scratch:
    """A file that tensors are appended to until they find their place in the artifact."""

    path: Path
    num_bytes: int = 0

    def append(self, tensor: Tensor) -> TensorSpan:
        """Append a tensor's bytes and return their place. Raises ArtifactError if writing fails."""
        span = TensorSpan(self.path, self.num_bytes, tensor.dtype, tuple(tensor.shape))
        try:
            with self.path.open("ab") as file:
                file.write(bytes_of(tensor.detach().contiguous()))
        except OSError as error:
            raise ArtifactError(f"{self.path.parent}: cannot write the weights: {error.strerror}") from None
        self.num_bytes += span.num_bytes
        return span


def write_spans(spans: Mapping[str, OnDisk], path: Path) -> None:
    """One safetensors file of tensors that lie elsewhere, the same bytes as `write_weights` writes from memory."""
    described = [(name, span.dtype, span.shape) for name, span in spans.items()]
    try:
        with path.open("wb") as file:
            file.write(header(described, METADATA))
            for name, _, _ in in_file_order(described):
                spans[name].copy_to(file)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write the weights: {error.strerror}") from None
