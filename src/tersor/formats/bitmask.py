"""Unstructured sparsity: one bit per weight says whether it is kept, and the kept values follow in fp16.

The plain sparse layout of compressed checkpoints (bitmask + values): `1 + 16 * density` bits per weight, so it is
smaller than fp16 below 15/16 density and smaller than int8 only below 7/16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.contract import Encoded, Layout, Packing, Params, Projector, Sparse, UsualMethods, Weight
from tersor.formats.float_cast import LARGEST_HALF, to_half
from tersor.formats.packing import pack, packed_width, unpack
from tersor.formats.trainable import Trainable


@dataclass(frozen=True)
class Bitmask(Sparse):
    """Kept weights in fp16, the others exactly zero.

    Parts:
        mask: packed bits `[out, ceil(in / 8)]` uint8, least significant bit first.
        values: the kept weights `[kept]` fp16, row by row.

    >>> weight = torch.tensor([[0.0, 2.0, 0.0, 3.0]])
    >>> sparse = Bitmask().encode(weight, Bitmask().fit(weight))
    >>> sparse.parts["mask"].tolist(), sparse.parts["values"].tolist()
    ([[10]], [2.0, 3.0])
    """

    name = "bitmask"
    rows_independent = False
    usual_methods = UsualMethods("magnitude", "magnitude", "sparsegpt")
    kept_grid = None
    pattern_width = None
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {}

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {"mask": mask_layout(shape), "values": (torch.float16, (None,))}

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {"mask": (1, shape[1])}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight) -> Params:
        """Keep the weights that are not zero."""
        return {"mask": weight != 0}

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return kept_halves(weight, params["mask"], self.name).float()

    def encode(self, weight: Weight, params: Params) -> Encoded:
        mask = params["mask"]
        values = kept_halves(weight, mask, self.name)[mask]
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"mask": pack_mask(mask), "values": values})

    def decode(self, encoded: Encoded) -> Weight:
        mask, values = self.unpack_mask(encoded), encoded.parts["values"]
        check_count(self.name, mask, len(values))
        return torch.zeros(encoded.shape, device=mask.device).masked_scatter_(mask, values.float())

    def choose(self, score: Float[Tensor, "out n"], sparsity: float | int = 0.5) -> Bool[Tensor, "out n"]:
        """Keep the largest scores of the whole matrix."""
        dropped = score.flatten().argsort(stable=True)[: int(sparsity * score.numel())]
        mask = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
        mask[dropped] = False
        return mask.view_as(score)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        return half_projector(params)

    # What formats that keep codes in place of halves build on.

    def kept_shape(self, shape: tuple[int, int]) -> tuple[int | None, ...]:
        """The shape of the kept values of a `shape` matrix, as `values` has it."""
        return (None,)

    def stored(self, mask: Bool[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Bool `[out, in]`: the weights that are stored, which are at least those of the mask."""
        return mask

    def unpack_mask(self, encoded: Encoded) -> Bool[Tensor, "out in"]:
        """Bool `[out, in]`: the weights that an encoded matrix stores."""
        return unpack(encoded.parts["mask"], bits=1, num_codes=encoded.shape[1]).bool()


def mask_layout(shape: tuple[int, int]) -> tuple[torch.dtype, tuple[int, int]]:
    """Dtype and shape of the packed mask of a `shape` matrix."""
    return torch.uint8, (shape[0], packed_width(shape[1], 1))


def pack_mask(mask: Bool[Tensor, "out in"]) -> UInt8[Tensor, "out width"]:
    """Pack a bool mask `[out, in]` into bytes `[out, ceil(in / 8)]`, least significant bit first."""
    return pack(mask.to(torch.uint8), bits=1)


def kept_halves(weight: Weight, mask: Bool[Tensor, "out in"], name: str) -> Tensor:
    """The kept weights in fp16, zero elsewhere. Raises FormatError naming the format where one overflows."""
    return to_half(torch.where(mask, weight, 0.0), f"{name}: the largest weight")


def half_projector(params: Params) -> Projector:
    """The columns of `kept_halves`; what is too large becomes the largest."""

    def project(values: Float[Tensor, " out"], j: int) -> Float[Tensor, " out"]:
        halves = values.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
        return torch.where(params["mask"][:, j], halves, 0.0)

    return project


def check_count(name: str, mask: Bool[Tensor, "out in"], num_values: int) -> None:
    """Raises FormatError unless there is one value for every bit."""
    num_kept = int(torch.count_nonzero(mask))
    if num_kept != num_values:
        raise FormatError(f"{name}: {num_kept} bits set for {num_values} values; the file is damaged")
