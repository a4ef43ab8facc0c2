"""A histogram of numbers that come in parts, whose range need not be known before.

Bins of equal width lie on both sides of zero, out to a power of two. Where a larger number comes, the power doubles and
neighbouring bins merge, so the result is the same however the numbers were parted. Exact zeros are counted apart.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

NUM_BINS = 2**13  # on both sides together: the largest number lies in the outer half of its side


class Histogram:
    """Counts of the numbers seen so far.

    >>> histogram = Histogram()
    >>> histogram.add(torch.tensor([0.0, 0.0, 3.0]))
    >>> histogram.add(torch.tensor([-1.0]))
    >>> histogram.table().round(decimals=2).tolist()
    [[-1.0, 0.0, 3.0], [1.0, 2.0, 1.0]]
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.float64)
        self.num_zeros = 0
        self.limit = 0.0  # the outer end of the bins; zero until a number other than zero has come

    def add(self, x: Tensor) -> None:
        """Count some numbers, in float32. Once one is NaN or infinite, so are all counts."""
        x = x.detach().float().flatten().cpu()
        if not len(x):
            return
        low, high = x.aminmax()
        largest = max(-low.item(), high.item())
        if not math.isfinite(largest):
            self.counts.fill_(math.nan)
            return
        num_zeros = len(x) - int(torch.count_nonzero(x))
        self.num_zeros += num_zeros
        if largest == 0:
            return
        self.grow(2.0 ** math.frexp(largest)[1])
        half = NUM_BINS // 2
        bins = (x * (half / self.limit)).floor_().to(torch.int32) + half  # exact: powers of two
        counts = torch.bincount(bins, minlength=NUM_BINS).double()
        counts[half] -= num_zeros
        self.counts += counts

    def grow(self, limit: float) -> None:
        """Widen the histogram to `limit`, a power of two."""
        self.limit = self.limit or limit
        while self.limit < limit:
            quarter = NUM_BINS // 4
            merged = torch.zeros_like(self.counts)
            merged[quarter:-quarter] = self.counts.view(-1, 2).sum(1)
            self.counts, self.limit = merged, 2 * self.limit

    def table(self) -> Float[Tensor, "2 bin"]:
        """The centres of all bins that hold numbers, in order, and how many each holds, float64."""
        width = 2 * self.limit / NUM_BINS
        centres = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) * width - self.limit
        half = NUM_BINS // 2
        zero = torch.tensor([0.0], dtype=torch.float64)
        values = torch.cat([centres[:half], zero, centres[half:]])
        counts = torch.cat([self.counts[:half], zero + self.num_zeros, self.counts[half:]])
        return torch.stack([values, counts])[:, counts != 0]
