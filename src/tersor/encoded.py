"""What is kept instead of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from tersor.formats.contract import Format


@dataclass(frozen=True, eq=False)
class Encoded:
    """A weight matrix in a format: exactly the tensors that go to disk.

    Attributes:
        format: the set of representable weights, which also knows the layout of `parts`.
        shape: `(out, in)` of the matrix it decodes to.
        parts: named tensors; nothing else is needed to decode.
    """

    format: Format
    shape: tuple[int, int]
    parts: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts, in memory and on disk alike."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """All side information counted."""
        return 8 * self.num_bytes / (self.shape[0] * self.shape[1])

    def decode(self) -> Float[Tensor, "out in"]:
        """The weight matrix, float32."""
        return self.format.decode(self)

    def rows(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Some rows of the decoded matrix; decodes only those where the format allows it (embeddings)."""
        if not self.format.rows_apart:
            return self.decode()[index]
        parts = {name: part[index] for name, part in self.parts.items()}
        return self.format.decode(Encoded(self.format, (len(index), self.shape[1]), parts))
