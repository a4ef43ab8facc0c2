"""Weights that share few values: a codebook of `k` fp16 numbers per output row, or for the whole tensor
(Han et al. 2016, Deep Compression, https://arxiv.org/abs/1510.00149; per row: Kim et al. 2023, SqueezeLLM,
https://arxiv.org/abs/2306.07629).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.formats.contract import Encoded, Grid, Layout, Packing, Params, Projector, UsualMethods, Weight
from tersor.formats.float_cast import to_half
from tersor.formats.packing import pack, packed_width, unpack
from tersor.formats.trainable import Trainable, half

# Suffixes: r codebook (one per row, or a single one), n weight it serves, k its value.


class SortedValues(Trainable):
    """The values of a codebook: each at least the one before it. Zero is what pruned weights share: it stays, and the
    other values stay on their side of it."""

    def constrained(self, start: Tensor, values: Tensor) -> Tensor:
        pruned = (start == 0).any(-1, keepdim=True)
        return torch.where(pruned & (values * start <= 0), torch.zeros_like(start), values)


def ascending(values: Tensor) -> Tensor:
    """Round to fp16, and raise each value to at least the one before it."""
    return half(values).cummax(-1).values


@dataclass(frozen=True)
class Codebook(Grid):
    """One of `num_values` values each, a power of two.

    Parts:
        codes: packed positions in the codebook `[out, ceil(in * log2(num_values) / 8)]` uint8.
        codebook: `[out, num_values]` fp16, or `[1, num_values]` for the whole tensor; ascending.

    >>> weight = torch.tensor([[0.1, -2.0, 0.1, 7.0, -2.0]])
    >>> encoded = Codebook(4).encode(weight, {"codebook": torch.tensor([[-2.0, 0.1, 5.0, 7.0]]).half()})
    >>> encoded.parts["codes"].tolist()
    [[209, 0]]
    """

    num_values: int
    per_tensor: bool = False
    rows_independent = True
    usual_methods = UsualMethods("nearest", "kmeans", "gptq")
    rounds_each_weight = False
    asymmetric_range = False
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {"codebook": SortedValues(ascending)}
    learnable_range = None

    @property
    def name(self) -> str:
        return f"codebook{self.num_values}{'-tensor' if self.per_tensor else ''}"

    @property
    def bits(self) -> int:
        return self.num_values.bit_length() - 1

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {
            "codes": (torch.uint8, (shape[0], packed_width(shape[1], self.bits))),
            "codebook": (torch.float16, (1 if self.per_tensor else shape[0], self.num_values)),
        }

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {"codes": (self.bits, shape[1])} if self.bits < 8 else {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """k-means, all weights counting the same; those beyond `shrink` times the range are cut off first. Raises
        FormatError where a value overflows fp16."""
        w_rn = self.grouped(weight).squeeze(1)
        range_r = w_rn.abs().amax(-1, keepdim=True) * shrink
        w_rn = w_rn.clamp(-range_r, range_r)
        return self.params(clustered(w_rn, torch.ones_like(w_rn), self.num_values))

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        book_rk = params["codebook"].float()
        w_rn = self.grouped(weight).squeeze(1)
        return book_rk.gather(1, nearest(w_rn, book_rk)).view(weight.shape)

    def encode(self, weight: Weight, params: Params) -> Encoded:
        codes = nearest(self.grouped(weight).squeeze(1), params["codebook"].float()).view(weight.shape)
        parts = {"codes": pack(codes.to(torch.uint8), self.bits), **params}
        return Encoded(self, (weight.shape[0], weight.shape[1]), parts)

    def decode(self, encoded: Encoded) -> Weight:
        codes = unpack(encoded.parts["codes"], self.bits, encoded.shape[1])
        book_rk = encoded.parts["codebook"].float()
        if len(book_rk) == 1:
            return book_rk[0][codes.int()]
        return book_rk.gather(1, codes.long())

    def grouped(self, weight: Weight) -> Float[Tensor, "rows groups k"]:
        """The weights `[rows, groups, k]`: a group is a row, or the whole matrix."""
        return weight.reshape(1, 1, -1) if self.per_tensor else weight.unsqueeze(1)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        book_rk = params["codebook"].float()
        ends_rk = middles(book_rk)

        def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
            v_rn = values.reshape(1, -1) if self.per_tensor else values.reshape(-1, 1)
            return book_rk.gather(1, torch.searchsorted(ends_rk, v_rn)).view(-1)

        return project

    def params(self, book_rk: Float[Tensor, "r k"]) -> Params:
        """A codebook as it is stored. Raises FormatError where a value overflows fp16."""
        # Adding zero makes -0 a 0, so that no number stands in a codebook twice with different bits.
        return {"codebook": to_half(book_rk, f"{self.name}: a value of") + 0}


def middles(book_rk: Float[Tensor, "r k"]) -> Float[Tensor, "r k-1"]:
    """Above `middles[:, i]` the value `i + 1` is nearer than the value `i`."""
    return ((book_rk[:, :-1] + book_rk[:, 1:]) / 2).contiguous()


def nearest(w_rn: Float[Tensor, "r n"], book_rk: Float[Tensor, "r k"]) -> Tensor:
    """Positions of the nearest values `[r, n]`; the lower of two that are equally near."""
    return torch.searchsorted(middles(book_rk), w_rn.contiguous())


def clustered(
    w_rn: Float[Tensor, "r n"], weight_rn: Float[Tensor, "r n"], num_values: int, num_iterations: int = 100
) -> Float[Tensor, "r k"]:
    """Weighted k-means of the numbers in each row, ascending: Lloyd's algorithm until nothing moves.

    In one dimension the clusters are intervals of the sorted numbers, so that one iteration takes `k log n` steps. It
    starts from the best density of levels at high rate, the cube root of the numbers' own (Panter and Dite 1951).
    """
    x, order = w_rn.contiguous().double().sort(dim=-1)
    weight = weight_rn.double().gather(1, order)
    totals = [cumulated(weight), cumulated(weight * x), cumulated(weight * x * x)]
    # Between neighbours dx apart with weight h, the density is h / dx; its cube root over dx integrates to:
    share = (weight[:, 1:] * x.diff(dim=-1).square()).pow(1 / 3)
    book = at_quantiles(x, cumulated(share), num_values)
    for _ in range(num_iterations):
        ends = torch.searchsorted(x, middles(book), right=True)
        ends = torch.nn.functional.pad(ends, (1, 0))
        ends = torch.cat([ends, torch.full_like(ends[:, :1], x.shape[1])], dim=1)
        mass, moment, square = (total.gather(1, ends).diff(dim=-1) for total in totals)
        mean = torch.where(mass > 0, moment / torch.where(mass > 0, mass, 1.0), book)
        # A value nobody needs goes to the end of the cluster with the largest error.
        unused, error = (mass == 0).int(), square - moment * mean
        place, worst = unused.argmax(-1, keepdim=True), error.argmax(-1, keepdim=True)
        end = x.gather(1, ends.gather(1, worst + 1).sub(1).clamp(min=0))
        split = unused.any(-1, keepdim=True) & (error.gather(1, worst) > 1e-9 * totals[2][:, -1:])
        moved = mean.scatter(1, place, torch.where(split, end, mean.gather(1, place))).sort(dim=-1).values
        if torch.equal(moved, book):
            break
        book = moved
    return book.float()


def cumulated(values: Tensor) -> Tensor:
    """Running sums of every row, beginning with 0: one more column than `values`."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def at_quantiles(x: Float[Tensor, "r n"], total: Float[Tensor, "r n"], num_values: int) -> Float[Tensor, "r k"]:
    """The points where the running total, linear between the ascending `x`, reaches 1/2k, 3/2k, ... of its end."""
    wanted = (torch.arange(num_values, device=x.device) + 0.5) / num_values * total[:, -1:]
    after = torch.searchsorted(total, wanted).clamp(1, max(1, x.shape[1] - 1)).clamp(max=x.shape[1] - 1)
    before = (after - 1).clamp(min=0)
    low, high = total.gather(1, before), total.gather(1, after)
    part = ((wanted - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
    return torch.lerp(x.gather(1, before), x.gather(1, after), part)
