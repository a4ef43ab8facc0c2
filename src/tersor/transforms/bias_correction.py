"""Bias correction (Nagel et al. 2019, section 4.2, https://arxiv.org/abs/1906.04721).

Rounding a weight shifts the mean of a layer's outputs by `(W' - W) E[x]`. The bias can take the shift back. It changes
what the model computes and is done to a site after its weight was chosen, so it is no row of the table but an option of
the weights step.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.threads import threads
from tersor.methods.solver import check_finite


@threads(1)
def corrected_bias(
    bias: Float[Tensor, " out"], error: Float[Tensor, "out in"], mean: Float[Tensor, "*group in"]
) -> Float[Tensor, " out"]:
    """The bias that keeps the mean output, in the bias's own type.

    Args:
        error: `W' - W`, the compressed weight minus the one it stands for.
        mean: `E[x]` of the site's inputs; for a grouped convolution, that of each group.

    Raises:
        DataError: the mean holds NaN or infinity.
    """
    check_finite("mean", mean)
    mean_gi = mean.to(error.device).double().view(-1, error.shape[1])
    error_goi = error.double().unflatten(0, (len(mean_gi), -1))
    return (bias.double() - torch.einsum("goi,gi->go", error_goi, mean_gi).flatten()).to(bias.dtype)
