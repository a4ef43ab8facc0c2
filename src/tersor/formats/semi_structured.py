"""Semi-structured sparsity: n weights kept of every m neighbouring columns, in fp16: `2:4` and `4:8`.

The pattern that sparse tensor cores run (Mishra et al. 2021, https://arxiv.org/abs/2104.08378). A mask of one bit per
weight says which ones are kept: as many bits as hardware's two 2-bit indices per four weights, and fewer than indices
for `4:8`. `2:4` and `4:8` take 9 bits per weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.bitmask import half_projector, kept_halves, mask_layout, pack_mask
from tersor.formats.contract import Encoded, Layout, Packing, Params, Projector, Sparse, UsualMethods, Weight
from tersor.formats.packing import unpack
from tersor.formats.trainable import Trainable


@dataclass(frozen=True)
class SemiStructured(Sparse):
    """Sparsity n:m: `n` of every `m` neighbouring weights of a row are kept in fp16, the others are exactly zero.

    Where `m` does not divide the columns, the last `r < m` of a row keep `min(n, r)`.

    Parts:
        mask: packed bits `[out, ceil(in / 8)]` uint8, least significant bit first; exactly n of every m are set.
        values: the kept weights `[out, kept per row]` fp16, by column.

    >>> weight = torch.tensor([[0.1, 2.0, -0.5, -3.0]])
    >>> sparse = SemiStructured(2, 4).encode(weight, SemiStructured(2, 4).fit(weight))
    >>> sparse.parts["mask"].tolist(), sparse.parts["values"].tolist()
    ([[10]], [[2.0, -3.0]])
    """

    n: int
    m: int
    rows_independent = True
    usual_methods = UsualMethods("magnitude", "magnitude", "sparsegpt")
    kept_grid = None
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {}

    @property
    def pattern_width(self) -> int:
        return self.m

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {"mask": mask_layout(shape), "values": (torch.float16, self.kept_shape(shape))}

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {"mask": (1, shape[1])}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight) -> Params:
        """Keep the weights of largest magnitude."""
        return {"mask": self.choose(weight.abs())}

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return kept_halves(weight, params["mask"], self.name).float()

    def encode(self, weight: Weight, params: Params) -> Encoded:
        stored = self.stored(params["mask"])
        values = kept_halves(weight, params["mask"], self.name)[stored].view(len(weight), -1)
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"mask": pack_mask(stored), "values": values})

    def decode(self, encoded: Encoded) -> Weight:
        mask = self.unpack_mask(encoded)
        return torch.zeros(encoded.shape, device=mask.device).masked_scatter_(mask, encoded.parts["values"].float())

    def choose(self, score: Float[Tensor, "out n"], sparsity: float | int = 0.5) -> Bool[Tensor, "out n"]:
        """Keep the n largest scores of every m columns; the pattern fixes the sparsity."""
        missing = -score.shape[1] % self.m
        # Places beyond the last column are dropped before any other.
        s_ogm = torch.nn.functional.pad(score, (0, missing), value=-torch.inf).unflatten(1, (-1, self.m))
        dropped = s_ogm.argsort(dim=-1, stable=True)[..., : self.m - self.n]
        mask = torch.ones_like(s_ogm, dtype=torch.bool).scatter_(-1, dropped, False)
        return mask.flatten(1)[:, : score.shape[1]]

    def projector(self, params: Params, shape: tuple[int, int]) -> Projector:
        return half_projector(params)

    # What formats that keep codes in place of halves build on.

    def kept_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the kept values of a `shape` matrix, as `values` has it."""
        whole, rest = divmod(shape[1], self.m)
        return (shape[0], whole * self.n + min(self.n, rest))

    def stored(self, mask: Bool[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The places that are stored: those of the mask, and more where it keeps fewer than the pattern."""
        stored = self.choose(mask.float())
        if (mask & ~stored).any():
            raise FormatError(f"{self.name}: the mask keeps more than {self.n} of {self.m} columns; use bitmask for it")
        return stored

    def unpack_mask(self, encoded: Encoded) -> Bool[Tensor, "out in"]:
        """The places an encoded matrix stores. Raises FormatError where a row stores too few or too many."""
        mask = unpack(encoded.parts["mask"], bits=1, num_codes=encoded.shape[1]).bool()
        num_kept = self.kept_shape(encoded.shape)[1]
        if (mask.sum(dim=1) != num_kept).any():
            raise FormatError(f"{self.name}: a row's mask does not have {num_kept} bits set; the file is damaged")
        return mask
