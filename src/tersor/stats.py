"""What calibration can tell about one site. Methods name the fields they read in `needs`."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Statistics of one site `[out, in]`; None where nothing was measured.

    Attributes:
        row_weight, column_weight: the curvature of the loss at weight `ij` is about `row_weight_i * column_weight_j`,
            per example, in the loss of the task's output (see calibrate.py). Columns have mean one.
    """

    row_weight: Float[Tensor, " out"] | None = None
    column_weight: Float[Tensor, " in"] | None = None

    def loss(self, error: Float[Tensor, "out in"]) -> float:
        """The predicted loss of changing the weight by `error`: half the weighted sum of squares, per example."""
        if self.row_weight is None or self.column_weight is None:
            return 0.5 * error.square().sum().item()
        rows, columns = self.row_weight.to(error.device), self.column_weight.to(error.device)
        return 0.5 * (rows @ (error.square() @ columns)).item()
