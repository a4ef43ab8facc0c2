"""The contract of a transform: a rewrite of the model that leaves its function as it is."""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from tersor.methods.stats import Stats


class Transform(Protocol):
    """A frozen dataclass whose fields are its whole configuration: in code, in recipes, on the command line.

    The law of every transform: in exact arithmetic, the model gives the same outputs before and after.

    Attributes:
        name: how recipes spell it.
        needs: the fields of `Stats` it reads; empty for transforms that need no data.
    """

    name: str
    needs: frozenset[str]

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        """Rewrite `model`, whose weights may be shared with the original: parameters are replaced, never written to.

        `stats` is keyed by site name and describes the model as it is given; after the rewrite it is out of date.
        Raises ModelError for a model it has nothing to do in.
        """
