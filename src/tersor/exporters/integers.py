"""Integer codes as the words of other clients.

tersor packs the codes of a row into one stream of bits, least significant first. Read as little-endian 32-bit words,
that is the stream which compressed-tensors stores, and, transposed, the one of GPTQ.
"""

from collections.abc import Collection

import torch
from jaxtyping import Int32
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.exporters.contract import Checkpoint, PackedSite
from tersor.formats.views import IntegerView


def symmetric_grid(packed: PackedSite, bits: Collection[int]) -> IntegerView | None:
    """The weight, if it is on a symmetric integer grid of one of these `bits` with full groups, and inputs stay
    float."""
    grid = packed.encoded.integers
    fits = grid is not None and grid.symmetric and grid.bits in bits and grid.whole_groups
    return grid if fits and packed.activation is None else None


def nearby_int4(packed: PackedSite) -> str:
    """The `int4` scheme with groups of 64 columns if these divide the weight's, else of 32."""
    return "int4-g64" if packed.site.shape[1] % 64 == 0 else "int4-g32"


def row_words(grid: IntegerView) -> Int32[Tensor, "out words"]:
    """The bit stream of each row as 32-bit words; the last is filled with zeros.

    >>> from tersor.formats.int_group import IntGroup
    >>> weight, scale = torch.tensor([[-8.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 7.0]]), torch.ones(1, 1).half()
    >>> hex(row_words(IntGroup(bits=4).encode(weight, {"scale": scale}).integers).item() & 0xFFFFFFFF)
    '0xf888ba90'
    """
    stream = grid.codes if grid.stored.dtype is torch.int8 else grid.stored
    return torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)


def only_format(checkpoint: Checkpoint) -> IntegerView:
    """A weight on the integer grid that `check_one_format` found everywhere."""
    grid = checkpoint.quantized[0].encoded.integers
    assert grid is not None
    return grid


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
