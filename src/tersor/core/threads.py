"""The number of threads that PyTorch computes with.

Sums of floats that threads share are taken in an order that depends on their number, and so are decompositions of
matrices. What decides about weights is therefore computed on one thread: `@threads(1)`, and `total`.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Context in which PyTorch runs on this many CPU threads."""
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


LEAST_WORK = 2**20  # products, below which a second thread costs more than it saves
Share = tuple[int, int]  # first, and one after the last


def shares(count: int, work: int) -> list[Share]:
    """`count` things in as many shares as PyTorch has threads, and no more than `work` (products in all) is worth.

    >>> with threads(2):
    ...     shares(5, 2**30), shares(5, 100)
    ([(0, 3), (3, 5)], [(0, 5)])
    """
    if work < 2 * LEAST_WORK or torch.get_num_threads() == 1:
        return [(0, count)]
    num = min(torch.get_num_threads(), count, work // LEAST_WORK)
    each = -(-count // num)
    return [(first, min(first + each, count)) for first in range(0, count, each)]


def spread(run: Callable[[int, int], None], parts: list[Share]) -> None:
    """Call `run` for every share, each on a thread of its own; `run` must give up the interpreter's lock.

    An interruption (Ctrl-C) does not stop the other threads: `run` has to hold what it reads and writes.
    """
    if len(parts) == 1:
        run(*parts[0])
        return
    mine, futures = parts[:1], []
    for part in parts[1:]:
        try:
            futures.append(pool().submit(run, *part))
        except RuntimeError:  # no thread can be started: the interpreter is shutting down, or there are too many
            mine.append(part)
    for part in mine:
        run(*part)
    for future in futures:
        future.result()


@cache
def pool() -> ThreadPoolExecutor:
    """The threads of `spread`, which start when they are needed."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "tersor")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not live on in a child
