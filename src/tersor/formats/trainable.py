"""The numbers beside the codes of a packed weight that training may move: scales, minima, codebooks, thin factors.

A format names its own in `trainable_parts`. Training adds `shift * unit` to the float32 value of a part and learns the
shift; `stored` rounds the result to what the file holds (training/tune_scales.py, training/qat.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Store = Callable[[Tensor], Tensor]  # float32 to what the file holds


@dataclass(frozen=True)
class Trainable:
    """A part of a packed weight that is a real number, with everything that training must know about it.

    Attributes:
        store: rounds float32 values to what the file holds, and to nothing that it cannot hold.
    """

    store: Store

    def prepared(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts that replace those of the weight before training, and decode to the same weight; none as a rule."""
        return {}

    def unit(self, part: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The change of the part for a shift of one: the root mean square of its rows, so that one learning rate
        suits the parts of every format."""
        return part.float().square().mean(-1, keepdim=True).sqrt()

    def constrained(self, start: Tensor, values: Tensor) -> Tensor:
        """The values `start + shift * unit`, where training may not move them freely; as they are as a rule."""
        return values


class LearnableRange(NamedTuple):
    """The levels of a format whose scale training can learn (LSQ): `(code - zero_point) * scale`, evenly spaced.

    Attributes:
        lowest, highest: the codes at both ends.
        num_steps: how many steps of the scale lie between them.
        largest: the highest level above zero, in steps.
        zero_point: the code of zero; None where every group stores its own as a byte, in units of `num_steps / 256`.
        group_size: how many columns share a scale; None where a whole row, or the whole matrix, does.
    """

    lowest: float
    highest: float
    num_steps: float
    largest: float
    zero_point: float | None = 0.0
    group_size: int | None = None


def half(values: Tensor) -> Tensor:
    """Round to fp16; what is too large becomes the largest."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half()


def bfloat(values: Tensor) -> Tensor:
    """Round to bfloat16."""
    return values.bfloat16()


def single(values: Tensor) -> Tensor:
    """Keep float32 values as they are."""
    return values.clone()


def byte(values: Tensor) -> Tensor:
    """Round to whole numbers from 0 to 255."""
    return values.round().clamp(0, 255).to(torch.uint8)


def e4m3(values: Tensor) -> Tensor:
    """Round to FP8 E4M3; negative values become zero, and what is too large becomes the largest."""
    return values.clamp(0, torch.finfo(torch.float8_e4m3fn).max).to(torch.float8_e4m3fn)
