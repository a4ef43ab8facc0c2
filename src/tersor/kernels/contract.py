"""The contract of a kernel: a way to run a linear map on an encoded weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.formats.contract import Encoded
from tersor.formats.views import IntegerView

Layout = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """A way to run a linear map.

    Attributes:
        fits: True if it computes what a site needs, from its weight, its input's quantizer and the type of the input.
        lay_out: makes the tensors that `run` takes besides the stored parts.
        run: `[token in]` to `[token out]`; the last argument is the bias.
        rounding: error of its result by rounding, relative to the largest output.
    """

    name: str
    fits: Callable[[Encoded, Activation | None, torch.dtype], bool]
    lay_out: Callable[[Encoded, Activation | None], Layout]
    run: Callable[[Tensor, Encoded, Activation | None, Layout, Tensor | None], Tensor]
    rounding: float


def grid_of(encoded: Encoded) -> IntegerView:
    """The weight as integers, which the kernel found it to be."""
    grid = encoded.integers
    assert grid is not None
    return grid


def scaled(sums: Tensor, scale: Tensor, of_rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums of products times both scales, those of the inputs and those of the weight's rows, and the bias."""
    y = sums.float().mul_(scale)
    weight_scale = of_rows.float().view(1, -1)
    y = y.mul_(weight_scale) if bias is None else torch.addcmul(bias.float(), y, weight_scale)
    return y.to(dtype)
