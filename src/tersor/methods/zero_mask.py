"""Zero mask: store which weights are zero already, and the values of the others (Han et al. 2015, Deep Compression,
https://arxiv.org/abs/1510.00149).

Whatever pruned the weights has chosen the mask already. Where the format holds integers, scales are searched for the
kept weights alone.
"""

from dataclasses import dataclass

from tersor.formats.contract import Encoded, Sparse, Weight
from tersor.methods.contract import MethodFor
from tersor.methods.magnitude import encode_masked
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class ZeroMask(MethodFor[Sparse]):
    """Keep every weight that is not zero.

    >>> import torch
    >>> from tersor.formats.bitmask import Bitmask
    >>> weight = torch.tensor([[0.0, -2.0, 3.0, 0.0]])
    >>> ZeroMask().compress(weight, Bitmask(), Stats()).parts["values"].tolist()
    [-2.0, 3.0]
    """

    name = "zero-mask"
    fills = Sparse
    refusal = "stores which weights are not zero, and {format} has no place for it; use bitmask"
    needs = frozenset({"column_weight"})

    def fill(self, weight: Weight, format: Sparse, stats: Stats) -> Encoded:
        """Raises FormatError where more weights are not zero than an n:m pattern holds."""
        return encode_masked(weight, weight != 0, format, stats)
