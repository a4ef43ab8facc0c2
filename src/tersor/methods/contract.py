"""The contract of a method: an algorithm that chooses a point of a format."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from tersor.formats.contract import Encoded, Format, Weight
from tersor.methods.stats import Stats


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


class BlockRun(Protocol):
    """A block of a model that can be run on any weights, beside what the original gives."""

    @property
    def num_examples(self) -> int: ...

    def __call__(self, weights: Mapping[str, Weight], examples: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output on some examples (their numbers), differentiable in the weights, and the original's."""


@runtime_checkable
class BlockMethod(Method, Protocol):
    """A method that chooses again when all sites of a block have been compressed, with the block's output in view."""

    def tune(self, weights: Mapping[str, Weight], starts: Mapping[str, Encoded], run: BlockRun) -> dict[str, Encoded]:
        """Better points for the sites of one block, by name.

        Args:
            weights: the weights as they were.
            starts: what `compress` made of them.
        """
