"""The contract of a codec: a tensor to bytes and back, bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CodecJob = Callable[[], None]  # fills a part of a tensor; tasks of one tensor may run side by side


@dataclass(frozen=True)
class Pieces:
    """A coded tensor.

    Attributes:
        head: what a decoder must know before any chunk; may be empty.
        chunks: blocks of rows, each decodable without the others.
    """

    head: bytes
    chunks: Sequence[bytes]

    @property
    def num_bytes(self) -> int:
        return len(self.head) + sum(map(len, self.chunks))


@dataclass(frozen=True, eq=False)
class PendingTensor:
    """A tensor on its way: `tensor` is whole when all tasks have run, in any order.

    Attributes:
        rows: which rows of the matrix, as the codec sees the tensor, each task fills.
    """

    tensor: Tensor
    tasks: Sequence[CodecJob]
    rows: Sequence[slice]


class Codec(Protocol):
    """A way to write tensors. What is decoded has the very bits of what was encoded."""

    @property
    def name(self) -> str: ...

    @property
    def has_head(self) -> bool:
        """True if the codec writes a head (`Pieces.head`) before the chunks."""

    def takes(self, dtype: torch.dtype) -> bool:
        """True if it codes tensors of this type."""

    def encode(self, tensor: Tensor) -> Pieces:
        """The tensor as bytes."""

    def decode(
        self, head: memoryview, chunks: Sequence[memoryview], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> PendingTensor:
        """The tensor, and what is left to do to fill it. Raises ArtifactError, here or in a task, for bytes that no
        encoder makes, before more memory is taken than the shape asks for; and never reads beyond the bytes."""
