"""Decoding: what every other kernel is judged against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.formats.contract import Encoded
from tersor.kernels.contract import Kernel, Layout
from tersor.kernels.int8 import is_int8


def always(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True if decoding is offered: wherever nothing else is much faster for every number of tokens."""
    return not is_int8(encoded, activation, dtype)


def nothing(encoded: Encoded, activation: Activation | None) -> Layout:
    """The stored parts are all it takes."""
    return {}


def run_decoded(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """The reference: decode the weight, multiply with it, and free it."""
    return F.linear(x if activation is None else activation.fake_quantize(x), encoded.decode(x.dtype), bias)


DECODE = Kernel("decode", always, nothing, run_decoded, 0.0)
