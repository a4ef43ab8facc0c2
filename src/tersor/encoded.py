"""What is kept instead of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from tersor.formats.contract import Format


CHUNK = 2**20  # weights decoded at a time: a few megabytes of working memory


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

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight matrix, computed in float32. A few rows at a time where the format allows it, so that little more
        memory is needed than the result takes."""
        num_rows, step = self.shape[0], max(1, CHUNK // self.shape[1])
        trained = any(part.requires_grad for part in self.parts.values())
        if not self.format.rows_apart or num_rows <= step or trained:
            return self.format.decode(self).to(dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=next(iter(self.parts.values())).device)
        for first in range(0, num_rows, step):
            parts = self.rows_of_parts(slice(first, first + step))
            shape = (min(step, num_rows - first), self.shape[1])
            weight[first : first + step] = self.format.decode(Encoded(self.format, shape, parts))
        return weight

    def rows(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Some rows of the decoded matrix; decodes only those where the format allows it (embeddings)."""
        if not self.format.rows_apart:
            return self.decode().index_select(0, index)
        parts = self.rows_of_parts(index)
        return self.format.decode(Encoded(self.format, (len(index), self.shape[1]), parts))

    def rows_of_parts(self, index: slice | Tensor) -> dict[str, Tensor]:
        """Some rows of every part; one that is a single row serves all rows, as in broadcasting."""
        if self.shape[0] == 1:
            return {name: part[index] for name, part in self.parts.items()}
        return {name: part if len(part) == 1 else part[index] for name, part in self.parts.items()}
