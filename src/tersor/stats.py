"""What calibration can tell about one site. Methods name the fields they need in `needs`."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass
class Stats:
    """Statistics of one site `[out, in]` over the calibration data.

    Attributes:
        input_square: `E[x_j^2]` of each input feature. For an embedding, whose inputs are one-hot, see `row_share`.
        output_fisher: `E[(dL/dy_i)^2]` of each output feature: the diagonal of the output Fisher, in nats per squared
            unit of output, per token. L is the loss the task's output calls for (see calibrate.py).
        row_share: how often each row of an embedding was read, per token.
        num_tokens: how many input vectors were seen.
        tokens_per_example: input vectors per example, so that a per-token loss becomes a per-example one.
    """

    input_square: Float[Tensor, " in"] | None = None
    output_fisher: Float[Tensor, " out"] | None = None
    row_share: Float[Tensor, " out"] | None = None
    num_tokens: int = 0
    tokens_per_example: float = 1.0
