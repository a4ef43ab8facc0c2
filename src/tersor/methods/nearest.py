"""Round to nearest: every weight to the closest point of the format's plain grid (absmax).

The baseline all post-training methods start from (Jacob et al. 2017, https://arxiv.org/abs/1712.05877).
"""

from dataclasses import dataclass

from tersor.formats.contract import Encoded, Format, Weight
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest value of the format, with the scales of `format.fit`; reads no data."""

    name = "nearest"
    needs = frozenset[str]()

    def accepts(self, format: Format) -> str | None:
        return None

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        return format.encode(weight, format.fit(weight))
