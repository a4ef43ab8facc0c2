"""Tensors beyond a memory limit lie in a temporary file, mapped back as ordinary tensors."""

import weakref

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.scratch import no_room, scratch_folder


class ActivationCache:
    """Keeps tensors in memory up to `limit` bytes, and further ones on disk. Either is freed with its last reference.

    >>> cache = ActivationCache(limit=8)
    >>> small, large = cache.keep(torch.ones(2)), cache.keep(torch.arange(3.0))
    >>> large.tolist(), cache.num_bytes_in_memory, cache.num_bytes_on_disk
    ([0.0, 1.0, 2.0], 8, 12)
    >>> del small, large
    >>> cache.num_bytes_in_memory, cache.num_bytes_on_disk
    (0, 0)
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.num_bytes_in_memory = self.num_bytes_on_disk = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it still fits into memory, else the same numbers mapped from a file."""
        size = tensor.nbytes
        if self.num_bytes_in_memory + size <= self.limit or tensor.device.type != "cpu" or not size:
            self.num_bytes_in_memory += size
            weakref.finalize(tensor, self._forget, size, 0)
            return tensor
        with scratch_folder() as folder:  # the mapping keeps the bytes until it goes
            file = folder / "tensor"
            try:
                file.write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            except OSError as error:
                raise InputError(no_room(error)) from None
            mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped = mapped.view(tensor.shape)
        self.num_bytes_on_disk += size
        weakref.finalize(mapped, self._forget, 0, size)
        return mapped

    def _forget(self, in_memory: int, on_disk: int) -> None:
        self.num_bytes_in_memory -= in_memory
        self.num_bytes_on_disk -= on_disk
