"""The contract of a format: a set of representable weights, and how one is laid out as tensors."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.encoded import Encoded

Weight = Float[Tensor, "out in"]
Params = dict[str, Tensor]  # scales, zero points, a mask, ...: what fixes the set for one weight
Layout = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]  # part -> dtype, shape; None: depends on the data


@runtime_checkable
class Format(Protocol):
    """A set of representable weights. Frozen dataclass; `name` is how recipes and artifacts spell it.

    The law that guards every format: what is stored is what was computed,
    `decode(encode(w, p)) == snap(w, p)` bit for bit.
    """

    @property
    def name(self) -> str: ...

    @property
    def rows_apart(self) -> bool:
        """Whether row i of every part decodes to row i of the weight."""

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape cannot be held, with the way out; None when it can."""

    def layout(self, shape: tuple[int, int]) -> Layout:
        """The parts of an encoded matrix of this shape. Readers check files against it before decoding."""

    def fit(self, weight: Weight) -> Params:
        """The plain choice of parameters for this weight. Methods may choose better ones."""

    def snap(self, weight: Weight, params: Params) -> Weight:
        """The nearest representable weight, float32."""

    def encode(self, weight: Weight, params: Params) -> Encoded:
        """The nearest representable weight, as parts."""

    def decode(self, encoded: Encoded) -> Weight:
        """The weight the parts stand for, float32."""
