"""Tensors as they are: the codec for what no other makes smaller. Bytes are copied, or mapped from the file."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tersor.codecs.contract import PendingTensor, Pieces
from tersor.core.errors import ArtifactError

CHUNK = 2**24  # bytes under one checksum


class Raw:
    """The codec `raw`: little-endian numbers, row by row."""

    name = "raw"
    has_head = False

    def takes(self, dtype: torch.dtype) -> bool:
        return True

    def encode(self, tensor: Tensor) -> Pieces:
        data = bytes_of(tensor)
        return Pieces(b"", [data[first : first + CHUNK] for first in range(0, len(data), CHUNK)])

    def decode(
        self, head: memoryview, chunks: Sequence[memoryview], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> PendingTensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        lengths = [min(CHUNK, num_bytes - first) for first in range(0, num_bytes, CHUNK)]
        if len(head) or lengths != [len(chunk) for chunk in chunks]:
            raise ArtifactError(f"{sum(map(len, chunks))} bytes for {tuple(shape)} {dtype}, which takes {num_bytes}")
        tensor = torch.empty(shape, dtype=dtype)
        memory = tensor.reshape(-1).view(torch.uint8).numpy()

        def copy(first: int, chunk: memoryview) -> None:
            memory[first : first + len(chunk)] = np.frombuffer(chunk, np.uint8)

        tasks = [lambda first=i * CHUNK, chunk=chunk: copy(first, chunk) for i, chunk in enumerate(chunks)]
        return PendingTensor(tensor, tasks, [slice(0, shape[0] if shape else 1)] * len(tasks))


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
