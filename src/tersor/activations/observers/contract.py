"""The contract of an observer: from what calibration saw of a site's inputs to the range that static codes span."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations.histogram import Histogram
from tersor.core.errors import DataError, InputError
from tersor.methods.stats import Stats


class CodeRange(Protocol):
    """The integers a range is spread over; `IntStatic` in activations/quantizers.py."""

    @property
    def name(self) -> str: ...

    def params(self, low: float, high: float) -> dict[str, Tensor]:
        """Scale and zero point that spread the codes from `low` to `high`, zero being one of the values."""

    def fake_quantize(self, x: Float[Tensor, "*batch"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch"]:
        """The nearest values that the range can represent."""


@runtime_checkable
class Observer(Protocol):
    """A frozen dataclass whose fields are its whole configuration: in code, in recipes, on the command line.

    Attributes:
        name: the name in schemes.
        needs: the fields of `Stats` it reads.
    """

    name: str
    needs: frozenset[str]

    def range(self, stats: Stats, codes: CodeRange) -> tuple[float, float]:
        """The smallest and the largest input that is not clipped; `low <= 0 <= high`.

        Raises InputError where calibration reached no input of the site, DataError where an input is not finite.
        """


def seen(codes: CodeRange, statistic: Tensor | None) -> Tensor:
    """A statistic that an observer reads, checked."""
    if statistic is None or not statistic.numel():
        raise InputError(
            f"{codes.name} needs calibration inputs, and none reached this site; give calibration data that does, or "
            f"use int8-dynamic"
        )
    if not statistic.isfinite().all():
        raise DataError(f"{codes.name}: the calibration inputs of this site hold NaN or infinity; check the data")
    return statistic


def histogram_of(codes: CodeRange, stats: Stats) -> Float[Tensor, "2 bin"]:
    """Values in order and their counts; those of the sample where nothing else was gathered."""
    if stats.histogram is not None:
        return seen(codes, stats.histogram)
    histogram = Histogram()
    histogram.add(seen(codes, stats.sample))
    return histogram.table()


def ranges_of(codes: CodeRange, stats: Stats) -> Float[Tensor, "run 2"]:
    """Smallest and largest input of each run; those of the sample where nothing else was gathered."""
    if stats.ranges is not None:
        return seen(codes, stats.ranges)
    return torch.stack(seen(codes, stats.sample).float().aminmax()).unsqueeze(0)
