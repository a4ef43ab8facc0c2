"""Bytes that a weight takes in the weights file: one count for plans, tables and reports.

The file's header (names, shapes, hashes) is not counted.
"""

from math import ceil

import torch

from tersor.codecs.integers import estimate_bits
from tersor.formats.contract import Encoded, Format


def file_bytes(encoded: Encoded) -> int:
    """Bytes of all parts in the file; entropy-coded ones as the coder estimates them, within a percent."""
    if not encoded.format.entropy_coded:
        return encoded.num_bytes
    whole = [part for part in encoded.parts.values() if not part.is_floating_point()]
    floats = sum(part.nbytes for part in encoded.parts.values() if part.is_floating_point())
    return ceil(sum(map(estimate_bits, whole)) / 8) + floats


def file_bytes_of_shape(format: Format, shape: tuple[int, int]) -> int | None:
    """Bytes of all parts of a matrix `[out, in]` in the file; None if they depend on its values.

    >>> from tersor.formats import FORMATS
    >>> file_bytes_of_shape(FORMATS["int4"], (2, 6)), file_bytes_of_shape(FORMATS["coded"], (2, 6))
    (10, None)
    """
    total = 0
    for dtype, sides in format.layout(shape).values():
        if format.entropy_coded or None in sides:
            return None
        total += torch.Size(sides).numel() * dtype.itemsize  # type: ignore[arg-type]
    return total
