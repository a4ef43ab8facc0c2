"""int8 weights whose products no 8-bit kernel overflows, on any processor.

Where a processor has no VNNI instructions (AVX2 machines, and AVX-512 ones before 2019), int8 kernels multiply with
`vpmaddubsw`, which adds two products of an unsigned input (0..255) and a signed weight in 16 bits, and saturates at
-32768 and 32767 without a word. Two neighbours are safe whatever the inputs are if and only if

    |w0 + w1| <= 128

for 255 * 128 = 32640 fits and 255 * 129 = 32895 does not; of two weights of unlike sign one product alone counts, and
255 * 127 = 32385 fits. Inputs that are signed in a file are shifted by 128 before the same instruction, and zero points
are taken off after the sum, so neither changes the bound. The usual ways around it are 7-bit weights (`reduce_range`,
four times the rounding noise), or slower products of unsigned weights. Here the weight keeps 8 bits, and its scale is
only as large as its pairs ask.

Which weights are neighbours depends on the kernel, and a weight that shall run anywhere keeps to all of them:

    ONNX Runtime    (0, 1), (2, 3), ... of the order (height, width, channel) within a group, without padding
    OpenVINO        channels (0, 1), (2, 3), ... of one pixel, padded to an even number
    oneDNN, fbgemm  neighbouring columns of a linear layer

For linear layers, and for an even number of channels, these are the same pairs. Kernels of depthwise convolutions do
not add in 16 bits, so their weights are free. What is used here of the instruction is in Intel's Software Developer's
Manual (https://www.intel.com/sdm), volume 2, PMADDUBSW.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from tersor.formats.contract import Format, Params, Projector, Weight
from tersor.formats.int_group import IntGroup

MOST = 128  # that two weights may be together: 255 * MOST fits in 16 bits
Matching = Int[Tensor, "pair 2"]  # columns, each at most once


@dataclass(frozen=True)
class Neighbours:
    """The columns of a weight matrix that kernels multiply and add in one step.

    Attributes:
        num_channels: input channels of one group.
        num_pixels: pixels of the kernel, 1 for a linear layer. Columns are ordered (channel, pixel), as in PyTorch.

    >>> [pairs.tolist() for pairs in Neighbours(4).matchings]
    [[[0, 1], [2, 3]]]
    >>> [pairs.tolist() for pairs in Neighbours(3, num_pixels=2).matchings]
    [[[0, 2], [1, 3]], [[0, 2], [4, 1], [3, 5]]]
    """

    num_channels: int
    num_pixels: int = 1

    @property
    def matchings(self) -> tuple[Matching, ...]:
        """All pairs of columns `[pair, 2]`, in sets in which no column occurs twice."""
        return matchings(self.num_channels, self.num_pixels)

    def partners(self) -> list[list[int]]:
        """For every column, the columns that it forms pairs with."""
        found: list[list[int]] = [[] for _ in range(self.num_channels * self.num_pixels)]
        for one, other in torch.cat(self.matchings).unique(dim=0).tolist():
            found[one].append(other)
            found[other].append(one)
        return found


@cache
def matchings(num_channels: int, num_pixels: int) -> tuple[Matching, ...]:
    """Pairs of columns that OpenVINO adds in one step, and those of ONNX Runtime where they differ."""
    columns = torch.arange(num_channels * num_pixels).view(num_channels, num_pixels).t()
    by_pixel = columns[:, : num_channels // 2 * 2].reshape(-1, 2)
    if num_channels % 2 == 0 or num_pixels == 1:
        return (by_pixel,)
    return by_pixel, columns.reshape(-1)[: columns.numel() // 2 * 2].view(-1, 2)


def largest_pair(codes: Float[Tensor, "out in"], neighbours: Neighbours) -> Float[Tensor, " out"]:
    """The largest `|w0 + w1|` of every row."""
    sums = [
        codes.index_select(1, pairs[:, 0]).add_(codes.index_select(1, pairs[:, 1])).abs_()
        for pairs in neighbours.matchings
        if len(pairs)
    ]
    return torch.cat(sums, 1).amax(1) if sums else codes.new_zeros(len(codes))


def keeps_pair_rule(codes: Int8[Tensor, "out in"], neighbours: Neighbours | None = None) -> bool:
    """True if no int8 kernel overflows on these weights, whatever the inputs are.

    Args:
        codes: signed weights as they are multiplied.
        neighbours: which of them are added in one step; of a linear layer if not given.

    >>> keeps_pair_rule(torch.tensor([[127, 1, -100, -28, 127]], dtype=torch.int8))
    True
    >>> keeps_pair_rule(torch.tensor([[127, 2]], dtype=torch.int8))
    False
    """
    return num_overflowing(codes, neighbours) == 0


def num_overflowing(codes: Int8[Tensor, "out in"], neighbours: Neighbours | None = None) -> int:
    """The number of rows with a pair whose products can overflow."""
    found = largest_pair(codes.short(), neighbours or Neighbours(codes.shape[1]))
    return int((found > MOST).sum())


@dataclass(frozen=True)
class SafeInt8(IntGroup):
    """`int8`, less the weights with a pair over `MOST`: a smaller set of representable weights, stored alike.

    Methods need not know of it: the plain scale spans the pairs as well as the weights, rounding is to the nearest
    point that keeps the rule, and a solver that fixes one column after another finds the second of a pair bounded by
    the first, and makes up for that like for any other error.

    >>> weight = torch.tensor([[1.0, 0.9, 0.5, -1.0]])
    >>> safe = SafeInt8(8, neighbours=Neighbours(4))
    >>> safe.encode(weight, safe.fit(weight)).parts["codes"]
    tensor([[ 67,  61,  34, -67]], dtype=torch.int8)
    >>> safe.encode(weight, IntGroup(8).fit(weight)).parts["codes"]
    tensor([[  70,   58,   64, -127]], dtype=torch.int8)
    """

    neighbours: Neighbours = Neighbours(0)

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """The scale that spans the weights and their pairs, or `shrink` times it."""
        largest = weight.abs().amax(1) / 127
        spanned = torch.maximum(largest, largest_pair(weight.float(), self.neighbours) / MOST)
        return {"scale": self.storable(spanned.unsqueeze(1) * shrink)}

    def quantize(self, weight: Weight, params: Params) -> Float[Tensor, "out in"]:
        """The nearest unsigned codes that keep the rule, as floats."""
        steps = (weight / self.divisor(params["scale"])).clamp_(-127, 127)
        codes = super().quantize(weight, params) - 128
        for pairs in self.neighbours.matchings:
            bring_down(codes, steps, pairs)
        return codes.add_(128)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        """Every column within what its partners leave it, as they were when last projected; at first they are free."""
        partners, scale = self.neighbours.partners(), params["scale"].float()[:, 0]
        divisor = self.divisor(params["scale"])[:, 0]
        codes = torch.zeros(shape[1], shape[0], device=scale.device)

        def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
            found = (values / divisor).clamp_(-127, 127)
            for other in partners[j]:
                found = torch.maximum(torch.minimum(found, MOST - codes[other]), -MOST - codes[other])
            # As quantize rounds: there is no negative zero.
            codes[j] = found.add_(128).round_().sub_(128)
            return codes[j] * scale

        return project


def without_overflow(format: Format, neighbours: Neighbours) -> Format:
    """The format less the weights that overflow, where it is one that int8 kernels multiply as it is stored."""
    plain = isinstance(format, IntGroup) and format.bits == 8 and format.symmetric and format.group_size is None
    return SafeInt8(8, neighbours=neighbours) if plain else format


def bring_down(codes: Float[Tensor, "out in"], steps: Float[Tensor, "out in"], pairs: Matching) -> None:
    """Move both weights of every pair that is over, in place, to where the pair is least away from `steps` together.

    Neither grows, nor changes its sign, so that no other pair can come to be over.
    """
    if not len(pairs):
        return
    first, second = codes[:, pairs[:, 0]], codes[:, pairs[:, 1]]
    rows, over = ((first + second).abs() > MOST).nonzero(as_tuple=True)
    if not len(rows):
        return
    one, other = pairs[over, 0], pairs[over, 1]
    sign = first[rows, over].sign()
    a, b = codes[rows, one] * sign, codes[rows, other] * sign
    middle = ((MOST + (steps[rows, one] - steps[rows, other]) * sign) / 2).round()
    down = middle.minimum(a).maximum(MOST - b)
    codes[rows, one], codes[rows, other] = down * sign, (MOST - down) * sign
