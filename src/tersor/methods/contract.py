"""The contract of a method: an algorithm that chooses a point of a format."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from tersor.core.errors import FormatError
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
        """A sentence that says why this method cannot write this format, and what to do; None if it can."""

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        """Choose the point of `format` that stands for `weight` (float32 `[out, in]`)."""


Kind = TypeVar("Kind", bound=Format)


class MethodFor(ABC, Generic[Kind]):
    """The base of methods that fill one kind of format: they name it, and refuse all others with one message.

    `class Kmeans(MethodFor[Codebook])` with `fills = Codebook` fills codebooks alone, and `fill` may rely on that.

    Attributes:
        fills: the class of the formats that it fills: one format's, `Grid` or `Sparse`.
        refusal: what is said of any other, as words after the method's name: what the method does, why `{format}` does
            not go with it, and after `use`, which does.
    """

    name: str
    needs: frozenset[str]
    fills: ClassVar[type[Any]]
    refusal: ClassVar[str]

    def accepts(self, format: Format) -> str | None:
        """A sentence that says why this method cannot write this format, and what to do; None if it can."""
        return None if isinstance(format, self.fills) else f"{self.name} {self.refusal.format(format=format.name)}"

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        """The weight encoded in `format`. Raises FormatError if `accepts` gives a reason."""
        if problem := self.accepts(format):
            raise FormatError(problem)
        return self.fill(weight, format, stats)  # type: ignore[arg-type]

    @abstractmethod
    def fill(self, weight: Weight, format: Kind, stats: Stats) -> Encoded:
        """The weight encoded in a format that the method accepts."""


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
