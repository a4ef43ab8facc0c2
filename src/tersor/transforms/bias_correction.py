"""Bias correction (Nagel et al. 2019, section 4.2, https://arxiv.org/abs/1906.04721).

Rounding a weight shifts the mean of a layer's outputs by `(W' - W) E[x]`. The bias can take the shift back. It changes
what the model computes and is done to a site after its weight was chosen, so it is no row of the table.
"""

from jaxtyping import Float
from torch import Tensor


def corrected_bias(
    bias: Float[Tensor, " out"], error: Float[Tensor, "out in"], mean: Float[Tensor, " in"]
) -> Float[Tensor, " out"]:
    """The bias that keeps the mean output, in the bias's own type.

    Args:
        error: `W' - W`, the compressed weight minus the one it stands for.
        mean: `E[x]` of the site's inputs.
    """
    return (bias.double() - error.double() @ mean.double()).to(bias.dtype)
