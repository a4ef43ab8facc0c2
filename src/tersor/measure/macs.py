"""Multiply-accumulates of one forward pass, by torch's own operator counter on the decoded model."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor.kernels import reference


def count_macs(model: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """MACs of calling `run(model)`: matrix products, convolutions and attention; element-wise work is not counted.

    >>> count_macs(nn.Linear(8, 4), lambda model: model(torch.zeros(2, 8)))
    64
    """
    counter = FlopCounterMode(display=False)
    with reference(), torch.no_grad(), counter:
        run(model)
    return counter.get_total_flops() // 2
