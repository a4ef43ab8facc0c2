"""Packed weights in the two forms that other programs read: integers with scales, or small floats with scales.

A format shows its parts in these terms (`as_integers`, `as_floats`), so that exporters and kernels need to know no
format by name: a new one that is integers with scales is exported as those are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from tersor.formats.packing import unpack


class IntegerView(NamedTuple):
    """A weight matrix as integers: `(codes - zero_points) * scale`.

    Attributes:
        bits: bits of a code.
        group_size: how many neighbouring columns share a scale; None where a whole row does. The last group of a row
            may be shorter.
        shape: `(out, in)` of the matrix.
        stored: the codes as they lie in the file: packed by rows as packing.py does, uint8
            `[out, ceil(in * bits / 8)]`, or signed bytes `[out, in]` int8, which are the codes less 128.
        scale: `[out, groups]` fp16; it may be negative.
        zero_byte: the zero points as they lie in the file, `[out, groups]` uint8, in units of `2**bits / 256` codes.
            None for a symmetric grid, whose zero point is `2**(bits - 1)`.
    """

    bits: int
    group_size: int | None
    shape: tuple[int, int]
    stored: Tensor
    scale: Tensor
    zero_byte: Tensor | None = None

    @property
    def symmetric(self) -> bool:
        """True if the zero point of every group is half the grid."""
        return self.zero_byte is None

    @property
    def plain_int8(self) -> bool:
        """True if the codes are signed bytes with one scale per row, as int8 kernels take them."""
        return self.stored.dtype is torch.int8 and self.group_size is None

    @property
    def whole_groups(self) -> bool:
        """True if every group of columns is full."""
        return self.group_size is None or self.shape[1] % self.group_size == 0

    @property
    def codes(self) -> UInt8[Tensor, "out in"]:
        """One code `0 ... 2**bits - 1` for each weight."""
        if self.stored.dtype is torch.int8:
            return (self.stored.short() + 128).to(torch.uint8)
        return unpack(self.stored, self.bits, self.shape[1])

    @property
    def signed_codes(self) -> Int16[Tensor, "out in"]:
        """The codes less half the grid, `-2**(bits - 1) ... 2**(bits - 1) - 1`: of symmetric grids, 0 stands for 0."""
        return self.codes.short() - 2 ** (self.bits - 1)

    @property
    def zero_points(self) -> Float[Tensor, "out groups"]:
        """The code that stands for zero in each group; it may have a fraction."""
        if self.zero_byte is None:
            return torch.full(self.scale.shape, 2.0 ** (self.bits - 1), device=self.scale.device)
        return self.zero_byte.float() * (2**self.bits / 256)


class FloatView(NamedTuple):
    """A weight matrix as floats of few bits, `value * scale`, or as ordinary 16-bit floats without any scale.

    Attributes:
        element: the type of a value: `fp16`, `bf16`, `e4m3`, `e5m2`, `e2m1` or `nf4`.
        group_size: how many neighbouring columns share a scale; None where a whole row or the whole matrix does.
        shape: `(out, in)` of the matrix.
        values: `[out, in]` of the type that PyTorch has for it; of 4-bit types the codes, two in a byte
            `[out, ceil(in / 2)]` uint8.
        scale: `[out, groups]`, `[out, 1]` or `[1, 1]`, in the type in which the file keeps it; None for 16-bit floats.
        nested: parts that the scales themselves are scaled with, by name; empty for most formats.
    """

    element: str
    group_size: int | None
    shape: tuple[int, int]
    values: Tensor
    scale: Tensor | None = None
    nested: Mapping[str, Tensor] = {}

    @property
    def is_ordinary(self) -> bool:
        """True if `values` is the weight itself, as an ordinary tensor."""
        return self.scale is None

    @property
    def whole_groups(self) -> bool:
        """True if every group of columns is full."""
        return self.group_size is None or self.shape[1] % self.group_size == 0
