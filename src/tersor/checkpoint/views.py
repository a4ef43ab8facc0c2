"""Packed codes as numbers: formats that pack codes of a few bits into bytes (formats/packing.py) say where they do, and
the coder sees the codes, not the bytes they straddle. What is unpacked from the file is packed again: the same bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Int8, UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tersor.core.errors import ArtifactError
from tersor.formats.packing import pack, packed_width, unpack

BLOCK = 2**18


class BytePacking(BaseModel):
    """The layout of codes in a tensor of bytes.

    Attributes:
        bits: bits of a code.
        columns: codes in a row; a vector is one row.
        zero: the code that the coder sees as 0.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: int = Field(ge=1, le=7)
    columns: int = Field(ge=1, lt=2**40)
    zero: int = Field(ge=0, lt=128)

    def codes(self, packed: UInt8[Tensor, "..."]) -> Int8[Tensor, "out n"]:
        """Unpack the codes and subtract `zero`."""
        rows = as_rows(packed)
        codes = torch.empty(len(rows), self.columns, dtype=torch.int8)
        for block in blocks(codes.shape):
            codes[block] = unpack(rows[block], self.bits, self.columns).to(torch.int8) - self.zero
        return codes

    def packed(self, codes: Int8[Tensor, "out n"], shape: tuple[int, ...]) -> UInt8[Tensor, "..."]:
        """The inverse. Raises ArtifactError for codes that are not of `bits` bits."""
        packed = torch.empty(len(codes), packed_width(self.columns, self.bits), dtype=torch.uint8)
        for block in blocks(codes.shape):
            shifted = codes[block].to(torch.int16) + self.zero
            if not 0 <= int(shifted.min()) <= int(shifted.max()) < 2**self.bits:
                raise ArtifactError(f"codes from {shifted.min()} to {shifted.max()} do not have {self.bits} bits")
            packed[block] = pack(shifted.to(torch.uint8), self.bits)
        return packed.view(shape)

    def rows(self, shape: tuple[int, ...]) -> int:
        """Rows of codes in a tensor of this shape. Raises ArtifactError if they do not fill it."""
        if len(shape) not in (1, 2) or packed_width(self.columns, self.bits) != shape[-1]:
            raise ArtifactError(f"rows of {self.columns} codes of {self.bits} bits do not fill {shape}")
        return 1 if len(shape) == 1 else shape[0]

    @classmethod
    def of(cls, packed: UInt8[Tensor, "..."], bits: int, columns: int) -> Self | None:
        """The view of a tensor, its most frequent code as `zero`; None where packing the codes again would not give
        the very same bytes."""
        if not packed.numel() or packed_width(columns, bits) != packed.shape[-1]:
            return None
        rows, often = as_rows(packed), torch.zeros(2**bits, dtype=torch.int64)
        for block in blocks((len(rows), columns)):
            codes = unpack(rows[block], bits, columns)
            if not torch.equal(pack(codes, bits), rows[block]):
                return None
            often += torch.bincount(codes.flatten(), minlength=2**bits)
        return cls(bits=bits, columns=columns, zero=int(often.argmax()))


def blocks(shape: Sequence[int]) -> list[slice]:
    """Slices of a matrix's rows, about `BLOCK` numbers each."""
    step = max(1, BLOCK // max(1, shape[1]))
    return [slice(first, first + step) for first in range(0, shape[0], step)]


def as_rows(packed: UInt8[Tensor, "..."]) -> UInt8[Tensor, "out width"]:
    """The tensor as a matrix; a vector becomes one row."""
    return packed if packed.dim() == 2 else packed.unsqueeze(0)


Packing = Mapping[str, tuple[int, int]]  # of some tensors, by name: bits of a code, codes of a row
