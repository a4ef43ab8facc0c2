"""Sparse and quantized: of the kept weights only their integer codes are stored: `2:4+int4-g64`, `bitmask+int8`, ...

Pruning and quantization of the same weight, as in Deep Compression (Han et al. 2015, https://arxiv.org/abs/1510.00149).
Bits per weight: `1 + bits * density`, and the scales; at half density and 4 bits as many as plain 3-bit integers take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.bitmask import Bitmask, mask_layout, pack_mask
from tersor.formats.contract import Encoded, Layout, Packing, Params, Projector, Sparse, UsualMethods, Weight
from tersor.formats.int_group import IntGroup
from tersor.formats.packing import pack, packed_width, unpack
from tersor.formats.semi_structured import SemiStructured
from tersor.formats.trainable import Trainable, half


@dataclass(frozen=True)
class SparseInt(Sparse):
    """Weights kept by a sparse pattern, on a symmetric integer grid; the others are exactly zero.

    The grid's groups are neighbouring columns of the whole matrix, kept or not. Parts:
        mask: as `pattern` has it.
        codes: unsigned codes of the kept weights, packed: row by row `[out, ceil(kept per row * bits / 8)]` uint8, or
            for `bitmask` all in one row `[ceil(kept * bits / 8)]`.
        scale: as `grid` has it.

    >>> format = SparseInt(SemiStructured(2, 4), IntGroup(bits=4))
    >>> weight = torch.tensor([[0.1, -0.8, 0.2, 0.3]])
    >>> format.fake_quantize(weight, format.fit(weight)).mul(10).round(decimals=1)
    tensor([[ 0., -8.,  0.,  3.]])
    >>> format.name, format.encode(weight, format.fit(weight)).parts["codes"].tolist()
    ('2:4+int4', [[176]])
    """

    pattern: Bitmask | SemiStructured
    grid: IntGroup
    usual_methods = UsualMethods("magnitude", "magnitude", "sparsegpt")
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {"scale": Trainable(half)}

    @property
    def kept_grid(self) -> IntGroup:
        return self.grid

    @property
    def pattern_width(self) -> int | None:
        return self.pattern.pattern_width

    @property
    def name(self) -> str:
        return f"{self.pattern.name}+{self.grid.name}"

    @property
    def rows_independent(self) -> bool:
        return self.pattern.rows_independent

    def layout(self, shape: tuple[int, int]) -> Layout:
        *rows, num_kept = self.pattern.kept_shape(shape)
        width = None if num_kept is None else packed_width(num_kept, self.grid.bits)
        codes = (torch.uint8, (*rows, width))
        return {"mask": mask_layout(shape), "codes": codes, "scale": self.grid.layout(shape)["scale"]}

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        width, bits = parts["codes"].shape[-1], self.grid.bits
        codes = {"codes": (bits, width * 8 // bits)} if bits < 8 else {}
        return {"mask": (1, shape[1]), **codes}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight) -> Params:
        """The pattern's plain mask, and the scales that span what it keeps. For a mask of your own, fit the weight that
        is zero elsewhere to `grid`. Raises FormatError where a scale overflows fp16."""
        mask = self.pattern.fit(weight)["mask"]
        try:
            return {"mask": mask, **self.grid.fit(torch.where(mask, weight, 0.0))}
        except FormatError as error:
            raise FormatError(f"{self.pattern.name}+{error}") from None

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return (
            torch.where(params["mask"], self.grid.fake_quantize(weight, scales(params)), 0.0) + 0.0
        )  # no negative zeros

    def encode(self, weight: Weight, params: Params) -> Encoded:
        stored = self.pattern.stored(params["mask"])
        codes = torch.where(params["mask"], self.grid.quantize(weight, scales(params)), self.zero)[stored]
        codes = codes.to(torch.uint8).view(len(weight) if self.rows_independent else 1, -1)
        packed = pack(codes, self.grid.bits)
        parts = {
            "mask": pack_mask(stored),
            "codes": packed if self.rows_independent else packed.squeeze(0),
            **scales(params),
        }
        return Encoded(self, (weight.shape[0], weight.shape[1]), parts)

    def decode(self, encoded: Encoded) -> Weight:
        mask, num_kept = self.pattern.unpack_mask(encoded), self.pattern.kept_shape(encoded.shape)[-1]
        num_codes = int(torch.count_nonzero(mask)) if num_kept is None else num_kept
        packed = encoded.parts["codes"] if self.rows_independent else encoded.parts["codes"].unsqueeze(0)
        if packed.shape[1] != packed_width(num_codes, self.grid.bits):
            raise FormatError(
                f"{self.name}: {packed.shape[1]} bytes of codes for {num_codes} kept weights; the file is damaged"
            )
        kept = unpack(packed, self.grid.bits, num_codes).float()
        codes = torch.full(encoded.shape, self.zero, device=mask.device).masked_scatter_(mask, kept)
        return self.grid.dequantize(codes, scales(encoded.parts)) + 0.0

    def choose(self, score: Float[Tensor, "out n"], sparsity: float | int = 0.5) -> Bool[Tensor, "out n"]:
        return self.pattern.choose(score, sparsity)

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        project = self.grid.projector(scales(params), shape)
        return lambda values, j: torch.where(params["mask"][:, j], project(values, j), 0.0) + 0.0

    @property
    def zero(self) -> float:
        """The code that stands for zero."""
        return float(2 ** (self.grid.bits - 1))


def scales(params: Params) -> Params:
    """The parameters, or parts, that the integer grid needs."""
    return {"scale": params["scale"]}
