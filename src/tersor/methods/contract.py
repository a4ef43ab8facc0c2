"""The contract of a method: an algorithm that chooses a point of a format."""

from typing import Protocol

from tersor.encoded import Encoded
from tersor.formats.contract import Format, Weight
from tersor.stats import Stats


class Method(Protocol):
    """A frozen dataclass whose fields are its whole configuration: in code, in recipes, on the command line.

    Attributes:
        name: how recipes spell it.
        needs: the fields of `Stats` it reads; empty for methods that need no data.
    """

    name: str
    needs: frozenset[str]

    def accepts(self, format: Format) -> str | None:
        """Why this method cannot fill this format, with the way out; None when it can."""

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        """Choose the point of `format` that stands for `weight` (float32 `[out, in]`)."""
