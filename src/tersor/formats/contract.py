"""The contract of a format: a set of representable weights, and how one is laid out as tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tersor.formats.trainable import LearnableRange, Trainable
from tersor.formats.views import FloatView, IntegerView

Weight = Float[Tensor, "out in"]
Params = dict[str, Tensor]  # scales, zero points, a mask, ...: what fixes the set for one weight
Layout = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]  # part -> dtype, shape; None: depends on the data
Packing = dict[str, tuple[int, int]]  # part -> bits of a code, codes of a row
CHUNK = 2**20  # weights decoded at a time: a few megabytes of working memory


@dataclass(frozen=True, eq=False)
class Encoded:
    """A weight matrix in a format: exactly the tensors that go to disk.

    Attributes:
        format: the set of representable weights, which also knows the layout of `parts`.
        shape: `(out, in)` of the matrix it decodes to.
        parts: named tensors; nothing else is needed to decode.
    """

    format: "Format"
    shape: tuple[int, int]
    parts: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts in memory; those in the file are counted by codecs/file_bytes.py."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight in memory, scales and all other parts included."""
        return 8 * self.num_bytes / (self.shape[0] * self.shape[1])

    @property
    def integers(self) -> IntegerView | None:
        """The weight as integers with scales, for clients that read such; None where it is none."""
        return self.format.as_integers(self)

    @property
    def floats(self) -> FloatView | None:
        """The weight as floats of few bits with scales, or as ordinary 16-bit floats; None where it is none."""
        return self.format.as_floats(self)

    def decode(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight matrix, computed in float32. A few rows at a time where the format allows it, so that little more
        memory is needed than the result takes."""
        num_rows, step = self.shape[0], max(1, CHUNK // self.shape[1])
        trained = any(part.requires_grad for part in self.parts.values())
        if not self.format.rows_independent or num_rows <= step or trained:
            return self.format.decode(self).to(dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=next(iter(self.parts.values())).device)
        for first in range(0, num_rows, step):
            parts = self.rows_of_parts(slice(first, first + step))
            shape = (min(step, num_rows - first), self.shape[1])
            weight[first : first + step] = self.format.decode(Encoded(self.format, shape, parts))
        return weight

    def rows(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Some rows of the decoded matrix; decodes only those where the format allows it (embeddings)."""
        if not self.format.rows_independent:
            return self.decode().index_select(0, index)
        parts = self.rows_of_parts(index)
        return self.format.decode(Encoded(self.format, (len(index), self.shape[1]), parts))

    def rows_of_parts(self, index: slice | Tensor) -> dict[str, Tensor]:
        """Some rows of every part; one that is a single row serves all rows, as in broadcasting."""
        if self.shape[0] == 1:
            return {name: part[index] for name, part in self.parts.items()}
        return {name: part if len(part) == 1 else part[index] for name, part in self.parts.items()}


class UsualMethods(NamedTuple):
    """The names of the methods that fill a format where nobody names one.

    Attributes:
        plain: the simplest, which looks at nothing but the weight: for comparisons.
        without_inputs: the best that needs no inputs of the site.
        with_inputs: the best there is, where calibration shows the inputs.
    """

    plain: str
    without_inputs: str
    with_inputs: str


class Format(ABC):
    """A set of representable weights. Formats are frozen dataclasses that inherit from this class, or from `Grid` or
    `Sparse` below; one that leaves out something abstract cannot be made.

    The law that guards every format: what is stored is what was computed,
    `decode(encode(w, p)) == fake_quantize(w, p)` bit for bit.

    Attributes:
        entropy_coded: True if the file codes its whole numbers by their probabilities: it then takes what they say, and
            not what they are in memory.
        sparse: True if its zeros are weights that were pruned, which nothing should fill again.
    """

    entropy_coded: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The word by which recipes, artifacts and the command line name it."""

    @property
    @abstractmethod
    def rows_independent(self) -> bool:
        """True if row i of every part decodes to row i of the weight; a part of a single row serves all rows."""

    @property
    @abstractmethod
    def usual_methods(self) -> UsualMethods:
        """The names of the methods that fill it where nobody names one."""

    @property
    @abstractmethod
    def rounds_each_weight(self) -> bool:
        """True if every weight takes the nearest of evenly spread levels, so that the error of plain rounding is a
        measure for any method's; False where weights are left out (pruned, of low rank) or share a few values."""

    @property
    @abstractmethod
    def trainable_parts(self) -> Mapping[str, Trainable]:
        """The parts that are real numbers and no codes, which training may move while the codes stay; empty where there
        are none."""

    @property
    @abstractmethod
    def learnable_range(self) -> LearnableRange | None:
        """The levels that a scale spreads, for training that learns `scale` together with the weights (QAT); None where
        it cannot."""

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """A sentence that says why the format cannot hold a matrix of this shape, and what to do; None if it can."""
        return None

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> Layout:
        """The parts of an encoded matrix of this shape. Readers check files against it before decoding."""

    @abstractmethod
    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        """The parts that are codes of a few bits, packed into bytes as packing.py does: by name, the bits of a code and
        the number of codes in a row; empty where there are none. An entropy coder unpacks the codes, since a code
        has a probability, and the byte that it straddles has not."""

    @abstractmethod
    def as_integers(self, encoded: Encoded) -> IntegerView | None:
        """A weight in this format as integers with scales, for kernels and for other programs, without copying any;
        None where it does not decode to just that."""

    @abstractmethod
    def as_floats(self, encoded: Encoded) -> FloatView | None:
        """A weight in this format as floats of few bits with scales, or as ordinary 16-bit floats; None where it does
        not decode to just that."""

    @abstractmethod
    def fit(self, weight: Weight) -> Params:
        """The plain choice of parameters for this weight. Methods may choose better ones."""

    @abstractmethod
    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        """The nearest representable weight, as a float32 matrix `[out, in]`."""

    @abstractmethod
    def encode(self, weight: Weight, params: Params) -> Encoded:
        """The nearest representable weight, as the tensors that are stored."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Weight:
        """The weight that the stored tensors represent, float32 `[out, in]`."""


Projector = Callable[[Float[Tensor, " out"], int], Float[Tensor, " out"]]  # values of column j -> representable ones


class Grid(Format):
    """A format whose weights stand apart once its parameters are fixed: integers, small floats, a codebook.

    Solvers choose the weights one column after another and need no more than the nearest value at a place. Methods that
    search better scales than the plain ones build on what the format says of them, where it says more than is usual.

    Attributes:
        search_range: where the best range of a group may lie, as parts of the plain one. Above 1 too as a rule, for
            uneven levels may do better with the largest weight below the highest of them.
        refits_every_range: True if the search calls `refit` for every range, and not for the best alone.
    """

    search_range: ClassVar[tuple[float, float]] = (0.7, 1.7)
    refits_every_range: ClassVar[bool] = False

    @property
    def integer_bits(self) -> int | None:
        """The bits of a code where the levels are evenly spread by one scale; None where they are not."""
        return None

    def refit(self, weight: Weight, params: Params, importance: Float[Tensor, " in"]) -> Params:
        """The scales that fit the weights best, by least squares weighted with `importance`, to the codes they have
        now; the very `params` where the format has no such scales."""
        return params

    def rescaled(self, params: Params, factor: Float[Tensor, "rows groups"]) -> Params:
        """Parameters whose scales are `factor` times as large; the very `params` where there are no such scales."""
        return params

    def chosen(self, first: Bool[Tensor, "rows groups"], ours: Params, others: Params) -> Params:
        """Parameters that are `ours` for the groups that `first` marks, and the others' elsewhere."""
        return {name: torch.where(first, part, others[name]) for name, part in ours.items()}

    @property
    def rounds_each_weight(self) -> bool:
        return True

    @property
    @abstractmethod
    def asymmetric_range(self) -> bool:
        """True if the levels of a group are not symmetric about zero and turn around with a negative `shrink`."""

    @abstractmethod
    def fit(self, weight: Weight, shrink: float | Tensor = 1.0) -> Params:
        """The parameters that span the weights' range, or `shrink` times it: a number, or one for each group
        `[rows, groups]` as `grouped` shapes them."""

    @abstractmethod
    def grouped(self, weight: Weight) -> Float[Tensor, "rows groups k"]:
        """The weights that share a scale, together; a group that is not full ends in zeros."""

    @abstractmethod
    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        """`project(values [out], j)`: the nearest representable values for column j of a `shape` matrix, float32,
        exactly those of `fake_quantize`."""


class Sparse(Format):
    """A format that keeps some of the weights and holds all others at exactly zero.

    Its parameters hold `mask`, bool `[out, in]`, True where a weight is kept. Methods say what matters, the format what
    it can keep.
    """

    sparse = True

    @property
    def rounds_each_weight(self) -> bool:
        return False

    @property
    def learnable_range(self) -> None:
        return None

    @property
    @abstractmethod
    def kept_grid(self) -> Grid | None:
        """The grid that kept weights are rounded to, whose parameters stand beside `mask`; None where they are kept as
        16-bit floats."""

    @property
    @abstractmethod
    def pattern_width(self) -> int | None:
        """The number of neighbouring columns that one pattern of the mask spans; None where it has no pattern."""

    @abstractmethod
    def choose(self, score: Float[Tensor, "out n"], sparsity: float | int = 0.5) -> Bool[Tensor, "out n"]:
        """The mask that keeps the highest scores: all but a fraction `sparsity` of them, exact to one, or as many as a
        fixed pattern says, whatever `sparsity` is. Of equal scores the first are dropped. The `n` columns may be a
        block of the weight's; for `n:m` patterns it starts at a multiple of m."""

    @abstractmethod
    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        """The nearest representable values for a column, as a Grid's. Changes made to `params["mask"]` count."""
