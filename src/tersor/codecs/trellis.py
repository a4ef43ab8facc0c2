"""Integers whose columns are paths of a trellis: what trellis-coded quantization chose (Marcellin and Fischer 1990,
https://doi.org/10.1109/26.46532; with an entropy code Fischer and Wang 1992), without the bit that its states tell.

As `integers.py`, with two differences. Where a decoder comes to a value it knows already whether that is even or odd,
and takes its table without the others; so all tables serve both kinds, and files share them with other integers. And
chunks have as many rows as paths do, so that each decodes by itself. Where low bits are kept as they are, the lowest is
not: the states tell it from the others.
"""

import torch
from jaxtyping import Int16
from torch import Tensor

from tersor.codecs.contract import Pieces
from tersor.codecs.integers import Integers, as_matrix, pieces_of
from tersor.codecs.plan import best_plan


class Trellis(Integers):
    """The codec `trellis`. Which trellis it is shows in the values themselves (formats/trellis.py)."""

    name = "trellis"
    trellis = True

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype == torch.int16

    def encode(self, tensor: Int16[Tensor, "..."]) -> Pieces:
        """Raises ValueError for columns that are paths of no trellis, or are smaller by `integers`."""
        values = as_matrix(tensor)
        plan = best_plan(values)
        if not plan.num_states:
            raise ValueError("these columns are paths of no trellis")
        return pieces_of(values, plan)
