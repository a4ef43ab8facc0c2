"""Multiply-accumulates of one forward pass, by torch's own operator counter on the decoded model."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tersor.kernels import reference


def count_macs(model: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """MACs of calling `run(model)`: matrix products, convolutions and attention; element-wise work is not counted.

    >>> count_macs(nn.Linear(8, 4), lambda model: model(torch.zeros(2, 8)))
    64
    """
    with reference(), torch.no_grad(), operation_counter() as counter:
        run(model)
    return counter.get_total_flops() // 2


def operation_counter() -> FlopCounterMode:
    """torch's counter with the attention and the LSTM of CPUs, which it lacks; two operations are one
    multiply-accumulate."""

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def lstm(steps: Any, of_inputs: Any, of_state: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return 2 * prod(steps[:-1]) * (prod(of_inputs) + prod(of_state))

    aten: Any = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={aten._scaled_dot_product_flash_attention_for_cpu: attention, aten.mkldnn_rnn_layer: lstm},
    )
