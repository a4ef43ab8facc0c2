"""Integer codes as the words of other clients.

tersor packs the codes of a row into one stream of bits, least significant first. Read as little-endian 32-bit words,
that is the stream which compressed-tensors stores, and, transposed, the one of GPTQ.
"""

from collections.abc import Collection

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.export.contract import Checkpoint, PackedSite
from tersor.formats.contract import Encoded
from tersor.formats.int_group import IntGroup
from tersor.formats.packing import unpack


def int_group(encoded: Encoded) -> IntGroup | None:
    """The format, if it is an integer grid."""
    return encoded.format if isinstance(encoded.format, IntGroup) else None


def whole_groups(encoded: Encoded) -> bool:
    """True if every group of columns is full."""
    group_size = getattr(encoded.format, "group_size", None)
    return not group_size or encoded.shape[1] % group_size == 0


def symmetric_grid(packed: PackedSite, bits: Collection[int]) -> IntGroup | None:
    """The format, if it is a symmetric integer grid of one of these `bits` with full groups, and inputs stay float."""
    group = int_group(packed.encoded)
    fits = group is not None and group.symmetric and group.bits in bits and whole_groups(packed.encoded)
    return group if fits and packed.activation is None else None


def nearby_int4(packed: PackedSite) -> str:
    """The `int4` whose groups are full in this site."""
    return "int4-g64" if packed.site.shape[1] % 64 == 0 else "int4-g32"


def unsigned_codes(encoded: Encoded) -> UInt8[Tensor, "out in"]:
    """One code `0 ... 2**bits - 1` per weight; the symmetric zero point is half the grid."""
    codes = encoded.parts["codes"]
    if codes.dtype is torch.int8:
        return (codes.short() + 128).to(torch.uint8)
    return unpack(codes, encoded.format.bits, encoded.shape[1])  # type: ignore[attr-defined]


def row_words(encoded: Encoded) -> Int32[Tensor, "out words"]:
    """The bit stream of each row as 32-bit words; the last is filled with zeros.

    >>> weight = torch.tensor([[-8.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 7.0]])
    >>> int4 = IntGroup(bits=4)
    >>> hex(row_words(int4.encode(weight, {"scale": torch.ones(1, 1, dtype=torch.float16)})).item() & 0xFFFFFFFF)
    '0xf888ba90'
    """
    stream = unsigned_codes(encoded) if encoded.parts["codes"].dtype is torch.int8 else encoded.parts["codes"]
    return torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)


def only_format(checkpoint: Checkpoint) -> IntGroup:
    """The integer grid that `check_one_format` found everywhere."""
    group = int_group(checkpoint.quantized[0].encoded)
    assert group is not None
    return group


def check_one_format(name: str, checkpoint: Checkpoint) -> None:
    """For clients that read bits and group size once for the whole model. Raises FormatError naming two sites."""
    first, *others = checkpoint.quantized
    for other in others:
        if other.scheme != first.scheme:
            raise FormatError(
                f"{name} holds one format in a model; {first.site.name} is {first.scheme} and {other.site.name} is "
                f"{other.scheme}; compress again with --rule '{other.site.name}={first.scheme}' "
                f"or export to compressed-tensors, which takes mixed formats"
            )
