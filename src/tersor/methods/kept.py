"""Keep what is not zero: store the weights that training left, in its own mask (Han et al. 2015, Deep Compression,
https://arxiv.org/abs/1510.00149).

Whatever pruned the weights has chosen the mask already. Where the format holds integers, scales are searched for the
kept weights alone.
"""

from dataclasses import dataclass

from tersor.formats.contract import Encoded, Sparse, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.magnitude import encode_kept
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Kept(MethodFor[Sparse]):
    """Keep every weight that is not zero.

    >>> import torch
    >>> from tersor.formats.bitmask import Bitmask
    >>> weight = torch.tensor([[0.0, -2.0, 3.0, 0.0]])
    >>> Kept().compress(weight, Bitmask(), Stats()).parts["values"].tolist()
    [-2.0, 3.0]
    """

    name = "kept"
    fills = Sparse
    refusal = "stores which weights are not zero, and {format} has no place for it; use bitmask"
    needs = frozenset({"column_weight"})

    def fill(self, weight: Weight, format: Sparse, stats: Stats) -> Encoded:
        """Raises FormatError where more weights are not zero than an n:m pattern holds."""
        return encode_kept(weight, weight != 0, format, stats)
