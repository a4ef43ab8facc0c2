"""Low rank: a weight as the product of two thin factors, alone (`lowrank`) or as the correction of another format.

A product of `[out, r]` and `[r, in]` in fp16 takes `16 * r * (out + in)` bits: less than the fp16 matrix only for
`r < out * in / (out + in)`, which is half the side of a square one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.core.threads import threads
from tersor.formats.contract import Encoded, Format, Layout, Packing, Params, UsualMethods, Weight
from tersor.formats.float_cast import to_half
from tersor.formats.int_group import IntGroup
from tersor.formats.trainable import Trainable, half

FACTORS = ("left", "right")


@dataclass(frozen=True)
class LowRank(Format):
    """Two thin factors: `weight = left @ right`, summed in float64 and rounded to float32.

    The parameters are the weight: `fake_quantize` does not look at what it is given.

    Parts:
        left: `[out, rank]` fp16.
        right: `[rank, in]` fp16.

    >>> weight = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])
    >>> encoded = LowRank().encode(weight, LowRank().fit(weight))
    >>> encoded.parts["left"].shape, encoded.decode().round(decimals=1)[1].tolist()
    (torch.Size([3, 1]), [2.0, 4.0])
    """

    name = "lowrank"
    rows_independent = False
    usual_methods = UsualMethods("svd", "svd", "svd")
    rounds_each_weight = False
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {name: Trainable(half) for name in FACTORS}
    learnable_range = None

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {"left": (torch.float16, (shape[0], None)), "right": (torch.float16, (None, shape[1]))}

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    @threads(1)
    def fit(self, weight: Weight, rank: int | None = None) -> Params:
        """The nearest product of this rank (Eckart-Young); without one, of the weight's own numerical rank."""
        u, sizes, vh = torch.linalg.svd(weight.contiguous().double(), full_matrices=False)
        if rank is None:
            rank = int((sizes > max(weight.shape) * torch.finfo(torch.float32).eps * sizes[0]).sum())
        return self.factors(u[:, :rank] * sizes[:rank], vh[:rank])

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return product(params).float()

    def encode(self, weight: Weight, params: Params) -> Encoded:
        return Encoded(self, (weight.shape[0], weight.shape[1]), dict(params))

    def decode(self, encoded: Encoded) -> Weight:
        return product(encoded.parts).float()

    def factors(self, left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]) -> Params:
        """Parameters for this product. Each pair of vectors is scaled so that both have the same largest magnitude,
        and turned so that the left one's is positive. Raises FormatError where a factor overflows fp16."""
        extreme = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).squeeze(0) if left.numel() else left.sum(0)
        largest = right.abs().amax(dim=1)
        empty = (extreme == 0) | (largest == 0)
        stretch = torch.where(empty, 1.0, (largest / extreme.abs()).sqrt() * extreme.sign())
        what = f"{self.name}: a factor of the weight with largest value"
        return {
            "left": to_half(left * stretch, what).contiguous(),
            "right": to_half(right / stretch.unsqueeze(1), what).contiguous(),
        }


@dataclass(frozen=True)
class Corrected(Format):
    """An integer format plus a low-rank correction: `weight = base + left @ right`.

    Parts: those of the base and of `lowrank`.

    >>> format = Corrected(IntGroup(bits=2))
    >>> weight = torch.tensor([[1.0, 0.4], [1.0, 0.4]])
    >>> params = format.base.fit(weight)
    >>> params |= LowRank().fit(weight - format.base.fake_quantize(weight, params), rank=1)
    >>> format.name, format.fake_quantize(weight, params)[0].mul(10).round().tolist()
    ('int2+lowrank', [10.0, 4.0])
    """

    base: IntGroup
    rows_independent = False
    usual_methods = UsualMethods("lqer", "lqer", "lqer")
    rounds_each_weight = True
    learnable_range = None

    @property
    def name(self) -> str:
        return f"{self.base.name}+lowrank"

    @property
    def trainable_parts(self) -> Mapping[str, Trainable]:
        return {**self.base.trainable_parts, **LowRank.trainable_parts}

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return self.base.why_not(shape)

    def layout(self, shape: tuple[int, int]) -> Layout:
        return self.base.layout(shape) | LowRank().layout(shape)

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight) -> Params:
        """The base's plain parameters, and a correction of rank zero."""
        try:
            return self.base.fit(weight) | LowRank().factors(weight[:, :0], weight[:0])
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        correction = product(params)
        nearest = self.base.fake_quantize((weight - correction).float(), base_of(params))
        return (nearest + correction).float()

    def encode(self, weight: Weight, params: Params) -> Encoded:
        nearest = self.base.encode((weight - product(params)).float(), base_of(params))
        return self.join(nearest, {name: params[name] for name in FACTORS})

    def decode(self, encoded: Encoded) -> Weight:
        nearest = self.base.decode(Encoded(self.base, encoded.shape, base_of(encoded.parts)))
        return (nearest + product(encoded.parts)).float()

    def join(self, base: Encoded, factors: Params) -> Encoded:
        """The weight in this format, from one in the base format and its low-rank correction."""
        return Encoded(self, base.shape, base.parts | factors)


def product(params: Params) -> Float[Tensor, "out in"]:
    """The product of both factors, in float64, so that every reader gets the same float32."""
    left, right = params["left"], params["right"]
    if left.shape[1] != right.shape[0]:
        raise FormatError(
            f"lowrank: factors of {tuple(left.shape)} and {tuple(right.shape)} do not multiply; the file is damaged"
        )
    return left.double() @ right.double()


def base_of(tensors: Params) -> Params:
    """Those of the parameters or parts that belong to the base format."""
    return {name: tensor for name, tensor in tensors.items() if name not in FACTORS}
