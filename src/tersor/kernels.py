"""Fast paths for running an encoded weight without decoding it.

A kernel is only used where it computes what the reference computes: `F.linear(activation.snap(x), weight.decode())`,
up to float rounding in the last step. `Reference()` switches them off, to judge them and to count operations.
"""

from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations import Activation, Int8Dynamic
from tersor.encoded import Encoded
from tersor.formats.int_group import IntGroup

_enabled = True


@contextmanager
def reference():
    """Run everything by decoding to float, inside this block."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def int8_dynamic_fits(encoded: Encoded, activation: Activation | None, x: Tensor) -> bool:
    """Whether `int8_dynamic_linear` can run this site on this input."""
    return (
        _enabled
        and activation is not None
        and activation.format == "int8-dynamic"
        and isinstance(encoded.format, IntGroup)
        and encoded.format.plain_int8
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and x.numel() > 0
    )


def int8_dynamic_linear(
    x: Float[Tensor, "*batch in"], encoded: Encoded, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """int8 x int8 -> int32 matrix product (oneDNN; VNNI where the CPU has it), then both scales and the bias.

    The products are summed exactly in int32, so the result is the same for every batch and thread count.
    """
    codes, scale = Int8Dynamic().quantize(x.reshape(-1, x.shape[-1]))
    sums = torch._int_mm(codes, encoded.parts["codes"].t())
    y = sums.float().mul_(scale)
    weight_scale = encoded.parts["scale"].float().view(1, -1)
    y = y.mul_(weight_scale) if bias is None else torch.addcmul(bias.float(), y, weight_scale)
    return y.to(x.dtype).view(*x.shape[:-1], -1)
