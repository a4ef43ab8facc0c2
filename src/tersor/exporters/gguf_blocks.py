"""The block types of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), filled from an Encoded.

A row is cut into blocks of 32 columns, each with its own fp16 scale `d` (and minimum `m`):

    Q8_0   d, 32 signed bytes                            code * d
    Q4_0   d, 16 bytes: columns 0-15 low, 16-31 high     (code - 8) * d
    Q5_0   d, the fifth bits as uint32, 16 bytes         (code - 16) * d
    Q4_1   d, m, 16 bytes                                code * d + m
    Q5_1   d, m, the fifth bits as uint32, 16 bytes      code * d + m

MXFP4 is an E8M0 byte and the codes laid out as in Q4_0. K-quants (see formats/k_quant.py) have super-blocks of 256:

    Q2_K   16 bytes: scale low, minimum high; low bits; d, m
    Q3_K   the third bits; low bits; 12 bytes of scales; d
    Q4_K   d, m, 12 bytes of scales and minima, 4-bit codes
    Q5_K   d, m, 12 bytes of scales and minima, the fifth bits, low 4 bits
    Q6_K   low 4 bits, upper 2 bits, 16 signed scales, d

A symmetric integer grid of few bits is a part of a larger one, and a scale that several blocks share is repeated: so
`int3-g64` is held exactly by Q4_0. Only a minimum may have to be rounded, to fp16.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersor.formats.contract import Encoded
from tersor.formats.k_quant import SUPER_BLOCK, KQuant
from tersor.formats.packing import unpack
from tersor.formats.views import FloatView, IntegerView

BLOCK = 32
CODE_BITS = {"Q8_0": 8, "Q4_0": 4, "Q5_0": 5, "Q4_1": 4, "Q5_1": 5}  # of the types that hold integer grids


class Blocks(NamedTuple):
    """A weight as ggml stores it; `rounding` is the largest change of a value, in steps of its grid."""

    type: str
    rows: UInt8[Tensor, "out bytes"]
    rounding: float


def block_type(encoded: Encoded) -> str | None:
    """The smallest ggml block type that holds the weight; None if none does."""
    if (format := k_quant(encoded)) is not None:
        return format.name.upper()
    if encoded.shape[1] % BLOCK:
        return None
    if mxfp4(encoded) is not None:
        return "MXFP4"
    grid = encoded.integers
    if grid is None or (grid.group_size or BLOCK) % BLOCK:
        return None
    if grid.symmetric:
        return "Q4_0" if grid.bits <= 4 else "Q5_0" if grid.bits == 5 else "Q8_0"
    return "Q4_1" if grid.bits <= 4 else "Q5_1" if grid.bits == 5 else None


def k_quant(encoded: Encoded) -> KQuant | None:
    """The format if it is one of ggml's K-quants, else None."""
    return encoded.format if isinstance(encoded.format, KQuant) else None


def mxfp4(encoded: Encoded) -> FloatView | None:
    """The weight, if it is made of 4-bit floats in blocks of 32 columns whose scales are powers of two, as bytes."""
    floats = encoded.floats
    if floats is None or floats.element != "e2m1" or floats.scale is None:
        return None
    return floats if floats.group_size == BLOCK and floats.scale.dtype is torch.uint8 else None


def to_blocks(encoded: Encoded) -> Blocks:
    """The weight in the type that `block_type` names."""
    type, grid = block_type(encoded), encoded.integers
    assert type is not None
    if (format := k_quant(encoded)) is not None:
        return Blocks(type, k_quant_rows(encoded, format), rounding=0.0)
    if (floats := mxfp4(encoded)) is not None and floats.scale is not None:
        codes = interleaved(unpack(floats.values, 4, floats.shape[1]).unflatten(1, (-1, BLOCK)), bits=4)
        return Blocks(type, torch.cat([floats.scale.unsqueeze(-1), codes], dim=-1).flatten(1), rounding=0.0)
    assert grid is not None
    scale = by_block(grid, grid.scale)
    codes = grid.codes.unflatten(1, (-1, BLOCK))
    fields, rounding = [bytes_of(scale)], 0.0
    if grid.symmetric:
        codes = codes + (2 ** (CODE_BITS[type] - 1) - 2 ** (grid.bits - 1))
    else:
        exact = -by_block(grid, grid.zero_points) * scale.float()
        minimum = exact.half()
        step = scale.float().abs().clamp_min(torch.finfo(torch.float32).tiny)
        rounding = ((minimum.float() - exact).abs() / step).max().item()
        fields.append(bytes_of(minimum))
    if type == "Q8_0":
        return Blocks(type, torch.cat([*fields, codes ^ 128], dim=-1).flatten(1), rounding)
    if CODE_BITS[type] == 5:
        fields.append(bytes_of(((codes.int() >> 4) << torch.arange(BLOCK)).sum(-1).to(torch.int32)))
        codes = codes & 15
    fields.append(interleaved(codes, bits=4))
    return Blocks(type, torch.cat(fields, dim=-1).flatten(1), rounding)


def by_block(grid: IntegerView, per_group: Float[Tensor, "out groups"]) -> Float[Tensor, "out blocks"]:
    """A group's number for each of its blocks."""
    num_blocks, group_size = grid.shape[1] // BLOCK, grid.group_size or grid.shape[1]
    return per_group.repeat_interleave(group_size // BLOCK, dim=1)[:, :num_blocks]


def bytes_of(numbers: Tensor) -> UInt8[Tensor, "out blocks bytes"]:
    """Little-endian bytes of one number per block."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def k_quant_rows(encoded: Encoded, format: KQuant) -> UInt8[Tensor, "out bytes"]:
    """The bytes of a K-quant weight: the same codes, scales and minima in ggml's order."""
    parts, blocks = encoded.parts, (encoded.shape[1] // SUPER_BLOCK, -1)
    codes = unpack(parts["codes"], format.bits, encoded.shape[1]).unflatten(1, blocks)
    if format.bits == 6:
        scales = parts["block_scale"].view(torch.uint8).unflatten(1, blocks)
    else:
        scales = format.block_codes(parts["block_scale"], blocks[0]).unflatten(1, blocks)
    fields = [bytes_of(parts["scale"])]
    if not format.kind.symmetric:
        minima = format.block_codes(parts["block_minimum"], blocks[0]).unflatten(1, blocks)
        fields.append(bytes_of(parts["minimum"]))
    if format.bits == 2:
        fields = [scales | minima << 4, interleaved(codes, bits=2, width=32), *fields]
    elif format.bits == 3:
        high = interleaved(codes >> 2, bits=1, width=32)
        scales = [interleaved(scales & 15, bits=4), interleaved(scales >> 4, bits=2)]
        fields = [high, interleaved(codes & 3, bits=2, width=32), *scales, *fields]
    elif format.bits == 6:
        high = interleaved(codes >> 4, bits=2, width=32)
        fields = [interleaved(codes & 15, bits=4, width=64), high, scales, *fields]
    else:
        # The upper half of the blocks: their upper two bits lie above the lower half's six, the others follow.
        for six in (scales, minima):
            fields.append(six[..., :4] | six[..., 4:] >> 4 << 6)
        fields.append(scales[..., 4:] & 15 | (minima[..., 4:] & 15) << 4)
        fields += [interleaved(codes >> 4, bits=1, width=32)] if format.bits == 5 else []
        fields.append(interleaved(codes & 15, bits=4, width=32))
    return torch.cat(fields, dim=-1).flatten(1)


def interleaved(
    codes: UInt8[Tensor, "out blocks n"], bits: int, width: int | None = None
) -> UInt8[Tensor, "out blocks bytes"]:
    """`width` bytes at a time, the first `width` codes in their lowest bits, the next ones above; without a width, one
    round takes all.

    >>> interleaved(torch.tensor([[[1, 2, 3, 4]]], dtype=torch.uint8), bits=4).tolist()
    [[[49, 66]]]
    """
    num_layers = 8 // bits
    layers = codes.unflatten(-1, (-1, num_layers, width or codes.shape[-1] // num_layers))
    shifts = bits * torch.arange(num_layers, dtype=torch.uint8, device=codes.device)
    return (layers << shifts.unsqueeze(-1)).sum(-2, dtype=torch.uint8).flatten(-2)
