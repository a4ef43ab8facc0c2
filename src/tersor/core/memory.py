"""Memory: the alignment that kernels need (some end the process without it), and errors that mean it is full."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ALIGNMENT = 64  # bytes, to a multiple of which operands of kernels begin


def is_aligned(tensor: Tensor) -> bool:
    """True if a CPU tensor begins at a multiple of `ALIGNMENT` bytes; also for other devices and fake tensors."""
    return tensor.device.type != "cpu" or isinstance(tensor, FakeTensor) or tensor.data_ptr() % ALIGNMENT == 0


def lies_here(tensor: Tensor) -> bool:
    """True if the numbers of a tensor are in the memory of the CPU, at its address and as its strides say, so that
    code which takes addresses can read them: an ordinary dense tensor, not a subclass (fake tensors lie nowhere), not
    on another device, and no view that negates what it reads."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and not tensor.is_neg()


def aligned(tensor: Tensor) -> Tensor:
    """The same tensor, or a copy that is aligned where it is not, as in a mapped file."""
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def available_memory() -> int | None:
    """Bytes that programs may still take without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
