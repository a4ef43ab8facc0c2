"""Whole numbers with a step for every row and every column, to be entropy-coded: `coded`.

    weight = code * (row_scale * column_scale)

The numbers are not clipped to a few bits: how often each occurs decides what it costs in the file (entropy-coded
scalar quantization, which at high rate stays within 0.255 bits of the bound: Gish and Pierce 1968,
https://doi.org/10.1109/TIT.1968.1054193). Scales are powers of two with a fraction, so that a few bits hold one; how
fine the fraction is, every site says for itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.core.threads import mean
from tersor.formats.contract import Encoded, Format, Layout, Packing, Params, UsualMethods, Weight
from tersor.formats.trainable import Trainable

LARGEST = 2**15 - 1  # of codes and of exponents
OCTAVE = 1 / 16  # that one in an exponent stands for, where nobody says better: 4 %
PLAIN_STEP = 1 / 4  # of the root mean square: about 4 bits a weight
FINER = 8  # times: as fine as the exponents of scales become before they are trained, 0.5 % instead of 4 %


@dataclass(frozen=True)
class Exponents(Trainable):
    """Exponents of the scales of rows or columns. For training they take smaller steps, which costs a few bits each.

    Attributes:
        column: of `scale`, where it says how many octaves one of these exponents stands for.
    """

    column: int = 1

    def prepared(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = "row" if self.column == 1 else "column"
        divisor = torch.ones(3, device=parts["scale"].device)
        divisor[self.column] = FINER
        return {name: parts[name] * FINER, "scale": parts["scale"] / divisor}

    def unit(self, part: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The change of the exponent that makes the scale e times as large, so that a small shift is a share of it."""
        return 1 / (parts["scale"][:, self.column].unsqueeze(1) * math.log(2))


def exponent(values: Tensor) -> Tensor:
    """Round values to whole exponents."""
    return values.round().clamp(-LARGEST, LARGEST).to(torch.int16)


@dataclass(frozen=True)
class Coded(Format):
    """Unclipped integers: in the file each takes as few bits as its probability says.

    Parts:
        codes: int16 `[out, in]`.
        row, column: exponents of the scales in fractions of an octave, int16 `[out, 1]` and `[1, in]`.
        scale: float32 `[1, 3]`: the site's scale, and how many octaves one in `row` and one in `column` stand for. So
            `row_scale = 2^(row * scale[1])` and `column_scale = scale[0] * 2^(column * scale[2])`.

    >>> params = scales(torch.ones(1), torch.tensor([0.5, 1.0, 0.25, 1.0]))
    >>> Coded().fake_quantize(torch.tensor([[0.6, -2.0, 0.1, 1.6]]), params)
    tensor([[ 0.5000, -2.0000,  0.0000,  2.0000]])
    """

    name = "coded"
    rows_independent = True
    usual_methods = UsualMethods("waterfill", "waterfill", "waterfill")
    rounds_each_weight = False
    trainable_parts: ClassVar[Mapping[str, Trainable]] = {
        "row": Exponents(exponent, column=1),
        "column": Exponents(exponent, column=2),
    }
    learnable_range = None
    entropy_coded = True

    def layout(self, shape: tuple[int, int]) -> Layout:
        return {
            "codes": (torch.int16, shape),
            "row": (torch.int16, (shape[0], 1)),
            "column": (torch.int16, (1, shape[1])),
            "scale": (torch.float32, (1, 3)),
        }

    def packing(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Packing:
        return {}

    def as_integers(self, encoded: Encoded) -> None:
        return None

    def as_floats(self, encoded: Encoded) -> None:
        return None

    def fit(self, weight: Weight) -> Params:
        """One step for all weights. Raises FormatError where rounding up would overflow."""
        largest = weight.abs().max().item()
        step = max(PLAIN_STEP * mean(weight.double().square()).sqrt().item(), largest / LARGEST) or 1.0
        if largest + step > torch.finfo(torch.float32).max:
            raise FormatError(
                f"{self.name}: the largest weight {largest:.3g} overflows when it is rounded; keep this weight as it is"
            )
        return scales(torch.ones_like(weight[:, 0]), torch.full_like(weight[0], step))

    def fake_quantize(self, weight: Weight, params: Params) -> Weight:
        return self.decode(self.encode(weight, params))

    def encode(self, weight: Weight, params: Params) -> Encoded:
        codes = (weight / steps(params)).round_().clamp_(-LARGEST, LARGEST).to(torch.int16)
        return Encoded(self, (weight.shape[0], weight.shape[1]), {"codes": codes, **params})

    def decode(self, encoded: Encoded) -> Weight:
        return encoded.parts["codes"] * steps(encoded.parts)


def scales(rows: Float[Tensor, " out"], columns: Float[Tensor, " in"], octave: float = OCTAVE) -> Params:
    """The parameters whose scales come nearest to these, all above zero.

    >>> scales(torch.tensor([1.0, 4.0]), torch.tensor([0.1]), octave=0.5)["row"].flatten().tolist()
    [-2, 2]
    """
    middles = [mean(scale.double().log2()) for scale in (rows, columns)]
    exponents = [
        ((scale.double().log2() - middle) / octave).round().clamp(-LARGEST, LARGEST).to(torch.int16)
        for scale, middle in zip((rows, columns), middles, strict=True)
    ]
    scale = torch.tensor([[torch.exp2(middles[0] + middles[1]), octave, octave]], dtype=torch.float32)
    return {"row": exponents[0].unsqueeze(1), "column": exponents[1].unsqueeze(0), "scale": scale.to(rows.device)}


def steps(params: Params) -> Float[Tensor, "out in"]:
    """The distance of neighbouring values, for every weight; differentiable where exponents are floats."""
    rows, columns = row_and_column_scales(params)
    return rows * columns


def row_and_column_scales(params: Params) -> tuple[Float[Tensor, "out 1"], Float[Tensor, "1 in"]]:
    """The scales of rows `[out, 1]` and columns `[1, in]`, whose product is `steps`."""
    scale, row_octave, column_octave = params["scale"].double().unsqueeze(-1).unbind(1)
    # Powers in float64, rounded once: the same bits for a row alone as for all of them.
    rows = torch.exp2(params["row"].double() * row_octave).float()
    columns = (scale * torch.exp2(params["column"].double() * column_octave)).float()
    return rows, columns
