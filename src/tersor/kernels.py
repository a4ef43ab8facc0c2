"""Fast paths for running an encoded weight without decoding it.

A kernel is only used where it computes what the reference computes: `F.linear(activation.snap(x), weight.decode())`,
up to float rounding in the last step. `Reference()` switches them off, to judge them and to count operations.
"""

from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations import Activation, Int8Dynamic, IntStatic
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


def int8_linear(
    x: Float[Tensor, "*batch in"], encoded: Encoded, activation: Activation, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"] | None:
    """int8 x int8 -> int32 matrix product (oneDNN; VNNI where the CPU has it), then the scales and the bias.

    The products are summed exactly in int32, so the result is the same for every batch and thread count. None where
    this site or this input has no such path.
    """
    if not int8_fits(encoded, activation, x):
        return None
    tokens, weight = x.reshape(-1, x.shape[-1]), encoded.parts["codes"].t()
    if activation.format == "int8-dynamic":
        codes, scale = Int8Dynamic().quantize(tokens)
        sums = torch._int_mm(codes, weight)
    else:
        # One more token, of zero points, gives what the offset of the codes adds to every sum.
        zero_point, scale = activation.params["zero_point"], activation.params["scale"]
        codes = torch.cat([IntStatic(8).quantize(tokens, activation.params), zero_point.expand(1, x.shape[-1])])
        sums = torch._int_mm(codes, weight)
        sums = sums[:-1].sub_(sums[-1])
    y = sums.float().mul_(scale)
    weight_scale = encoded.parts["scale"].float().view(1, -1)
    y = y.mul_(weight_scale) if bias is None else torch.addcmul(bias.float(), y, weight_scale)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def int8_fits(encoded: Encoded, activation: Activation, x: Tensor) -> bool:
    """Whether `int8_linear` can run this site on this input."""
    return (
        _enabled
        and activation.format in ("int8-dynamic", "int8-static")
        and isinstance(encoded.format, IntGroup)
        and encoded.format.plain_int8
        and encoded.shape[1] <= MOST_COLUMNS
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and x.numel() > 0
    )


MOST_COLUMNS = 2**31 // (256 * 127)  # whose sums, zero points included, cannot overflow int32
