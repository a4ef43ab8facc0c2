"""The number of threads that PyTorch computes with.

Sums of floats that threads share are taken in an order that depends on their number, and so are decompositions of
matrices. What decides about weights is therefore computed on one thread: `@threads(1)`, and `total`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Run on this many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@threads(1)
def total(x: Tensor) -> Tensor:
    """The sum of all numbers, the same whatever the number of threads."""
    return x.sum()


def mean(x: Tensor) -> Tensor:
    """The mean of all numbers, the same whatever the number of threads."""
    return total(x) / x.numel()
