"""Where tensors begin in memory (kernels may end the process where what they read begins elsewhere), and its end."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ALIGNMENT = 64  # bytes, to a multiple of which operands of kernels begin


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins at such a multiple."""
    return tensor.data_ptr() % ALIGNMENT == 0


def aligned(tensor: Tensor) -> Tensor:
    """A tensor that does: the same, or a copy where it lies elsewhere, as in a mapped file."""
    whole = tensor.device.type != "cpu" or isinstance(tensor, FakeTensor) or is_aligned(tensor)
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough of it, as Python, NumPy, torch or a runtime says in words of its own."""
    words = ("allocate memory", "out of memory", "bad_alloc", "bad allocation", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)
