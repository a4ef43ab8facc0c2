"""The statistics of one site that calibration gathers. Methods name the fields they read in `needs`."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tersor.core.threads import threads


@dataclass(frozen=True)
class Stats:
    """Statistics of one site `[out, in]`; None where nothing was measured.

    Attributes:
        row_weight, column_weight: the curvature of the loss at weight `ij` is about `row_weight_i * column_weight_j`,
            per example, in the loss of the task's output (see calibration/curvature.py). Columns have mean one.
        second_moment: `S = E[x x']` over tokens, where x is the site's input in the model compressed so far.
        cross_moment: `E[x_original x']`, where x_original is the same token's input in the original model.
        mean: `E[x]`; for a grouped convolution, that of each group.
        largest: the largest `|x|` of every input feature.
        sample: a few hundred inputs x, drawn at random.
        ranges: the smallest and the largest number of every run of a few thousand inputs, in their order.
        histogram: of all numbers in the inputs: bin centres and how many each holds (see activations/histogram.py).
        num_tokens: how many inputs the moments are averaged over.
        num_axes: how many axes the layer's input has; what transforms are given wherever there is data.
    """

    row_weight: Float[Tensor, " out"] | None = None
    column_weight: Float[Tensor, " in"] | None = None
    second_moment: Float[Tensor, "in in"] | None = None
    cross_moment: Float[Tensor, "in in"] | None = None
    mean: Float[Tensor, "*group in"] | None = None
    largest: Float[Tensor, " in"] | None = None
    sample: Float[Tensor, "token in"] | None = None
    ranges: Float[Tensor, "run 2"] | None = None
    histogram: Float[Tensor, "2 bin"] | None = None
    num_tokens: int = 0
    num_axes: int | None = None

    @threads(1)
    def loss(self, error: Float[Tensor, "out in"]) -> float:
        """The predicted loss of changing the weight by `error`: half the weighted sum of squares, per example."""
        if self.row_weight is None or self.column_weight is None:
            return 0.5 * error.square().sum().item()
        rows, columns = self.row_weight.to(error.device), self.column_weight.to(error.device)
        return 0.5 * (rows @ (error.square() @ columns)).item()
