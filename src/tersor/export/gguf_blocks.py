"""The block types of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), filled from an Encoded.

A row is cut into blocks of 32 columns, each with its own fp16 scale `d` (and minimum `m`):

    Q8_0   d, 32 signed bytes                            code * d
    Q4_0   d, 16 bytes: columns 0-15 low, 16-31 high     (code - 8) * d
    Q5_0   d, the fifth bits as uint32, 16 bytes         (code - 16) * d
    Q4_1   d, m, 16 bytes                                code * d + m
    Q5_1   d, m, the fifth bits as uint32, 16 bytes      code * d + m

A symmetric integer grid of few bits is a part of a larger one, and a scale that several blocks share is repeated: so
`int3-g64` is held exactly by Q4_0. Only a minimum may have to be rounded, to fp16.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersor.encoded import Encoded
from tersor.export.integers import int_group, unsigned_codes

BLOCK = 32
CODE_BITS = {"Q8_0": 8, "Q4_0": 4, "Q5_0": 5, "Q4_1": 4, "Q5_1": 5}


class Blocks(NamedTuple):
    """A weight as ggml stores it; `rounding` is the largest change of a value, in steps of its grid."""

    type: str
    rows: UInt8[Tensor, "out bytes"]
    rounding: float


def block_type(encoded: Encoded) -> str | None:
    """The smallest type that holds the weight, or None."""
    group = int_group(encoded)
    blocks = encoded.shape[1] % BLOCK == 0 and (group and (group.group_size or BLOCK) % BLOCK == 0)
    if group is None or not blocks:
        return None
    if group.symmetric:
        return "Q4_0" if group.bits <= 4 else "Q5_0" if group.bits == 5 else "Q8_0"
    return "Q4_1" if group.bits <= 4 else "Q5_1" if group.bits == 5 else None


def to_blocks(encoded: Encoded) -> Blocks:
    """The weight in the type that `block_type` names."""
    type, group = block_type(encoded), int_group(encoded)
    assert type is not None
    assert group is not None
    scale = by_block(encoded, encoded.parts["scale"])
    codes = unsigned_codes(encoded).unflatten(1, (-1, BLOCK))
    fields, rounding = [bytes_of(scale)], 0.0
    if group.symmetric:
        codes = codes + (2 ** (CODE_BITS[type] - 1) - 2 ** (group.bits - 1))
    else:
        zero_point = group.zero_point(encoded.parts)
        assert isinstance(zero_point, Tensor)
        exact = -by_block(encoded, zero_point.squeeze(-1)) * scale.float()
        minimum = exact.half()
        step = scale.float().abs().clamp_min(torch.finfo(torch.float32).tiny)
        rounding = ((minimum.float() - exact).abs() / step).max().item()
        fields.append(bytes_of(minimum))
    if type == "Q8_0":
        return Blocks(type, torch.cat([*fields, codes ^ 128], dim=-1).flatten(1), rounding)
    if CODE_BITS[type] == 5:
        fields.append(bytes_of(((codes.int() >> 4) << torch.arange(BLOCK)).sum(-1).to(torch.int32)))
        codes = codes & 15
    fields.append(codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)
    return Blocks(type, torch.cat(fields, dim=-1).flatten(1), rounding)


def by_block(encoded: Encoded, per_group: Float[Tensor, "out groups"]) -> Float[Tensor, "out blocks"]:
    """A group's number for each of its blocks."""
    num_blocks = encoded.shape[1] // BLOCK
    group_size = getattr(encoded.format, "group_size", None) or encoded.shape[1]
    return per_group.repeat_interleave(group_size // BLOCK, dim=1)[:, :num_blocks]


def bytes_of(numbers: Tensor) -> UInt8[Tensor, "out blocks bytes"]:
    """Little-endian bytes of one number per block."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)
