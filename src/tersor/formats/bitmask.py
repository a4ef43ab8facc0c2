"""Unstructured sparsity: one bit per weight says whether it is kept, and the kept values follow in fp16.

The plain sparse layout of compressed checkpoints (bitmask + values): `1 + 16 * density` bits per weight, so it is
smaller than fp16 below 15/16 density and smaller than int8 only below 7/16.
"""

from dataclasses import dataclass

import torch

from tersor.encoded import Encoded
from tersor.errors import FormatError
from tersor.formats.contract import Layout, Params, Weight
from tersor.formats.packing import pack, packed_width, unpack


@dataclass(frozen=True)
class Bitmask:
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
    rows_apart = False

    def misfit(self, shape: tuple[int, int]) -> str | None:
        return None

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {"mask": (torch.uint8, (shape[0], packed_width(shape[1], 1))), "values": (torch.float16, (None,))}

    def fit(self, weight: Weight) -> Params:
        """Keeps what is not zero already."""
        return {"mask": weight != 0}

    def snap(self, weight: Weight, params: Params) -> Weight:
        return torch.where(params["mask"], self.half(weight).float(), 0.0)

    def encode(self, weight: Weight, params: Params) -> Encoded:
        mask = params["mask"]
        parts = {"mask": pack(mask.to(torch.uint8), bits=1), "values": self.half(weight)[mask]}
        return Encoded(self, (weight.shape[0], weight.shape[1]), parts)

    def decode(self, encoded: Encoded) -> Weight:
        mask = unpack(encoded.parts["mask"], bits=1, num_codes=encoded.shape[1]).bool()
        values = encoded.parts["values"]
        num_kept = int(torch.count_nonzero(mask))
        if num_kept != len(values):
            raise FormatError(f"bitmask: {num_kept} bits set for {len(values)} values; the file is damaged")
        return torch.zeros(encoded.shape, device=mask.device).masked_scatter_(mask, values.float())

    @staticmethod
    def half(weight: Weight) -> torch.Tensor:
        half = weight.half()
        if half.isinf().any():
            raise FormatError(f"bitmask: the largest weight {weight.abs().max().item():.3g} overflows fp16")
        return half
