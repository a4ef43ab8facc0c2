"""HQQ: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/).

Data-free. Keeps the scale and moves the zero point so that the error is small in an l_p norm with p < 1, which lets a
few outliers be wrong and the many be right. Half-quadratic splitting alternates two closed forms: the error is shrunk
(generalized soft threshold), then the zero point is the mean of what is left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.formats.contract import Encoded, Format, Params, Weight
from tersor.formats.int_group import IntGroup, by_rows
from tersor.methods.contract import MethodFor
from tersor.methods.stats import Stats


@dataclass(frozen=True)
class Hqq(MethodFor[IntGroup]):
    """Move zero points by half-quadratic splitting.

    Attributes:
        p: the norm; below 1 it is blind to outliers.
        beta: weight of the splitting term, in units of one over the squared step; grows by `kappa` each iteration.
        kappa: its growth.
        num_iterations: at most this many; a group keeps its best zero point.
    """

    p: float = 0.7
    beta: float = 2.0
    kappa: float = 1.05
    num_iterations: int = 20

    name = "hqq"
    fills = IntGroup
    refusal = "moves zero points, and {format} has none; use int4-g64-asym"
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not (0 < self.p <= 2 and self.beta > 0 and self.kappa > 0 and self.num_iterations > 0):
            raise InputError(f"{self}: p must lie in (0, 2], and beta, kappa and num_iterations above 0")

    def accepts(self, format: Format) -> str | None:
        problem = super().accepts(format)
        if problem is None and format.symmetric:  # type: ignore[attr-defined]
            return f"hqq moves zero points, and {format.name} has none; use {format.name}-asym, or the method mse"
        return problem

    def fill(self, weight: Weight, format: IntGroup, stats: Stats) -> Encoded:
        return format.encode(weight, by_rows(weight, lambda rows: self.search(rows, format)))

    def search(self, weight: Weight, format: IntGroup) -> Params:
        """The absmax scales, and the zero point of every group with the least `|error|^p` of all iterations."""
        best = format.fit(weight)
        scale = format.divisor(best["scale"]).unsqueeze(-1)
        w_ogk = format.grouped(weight) / scale  # in steps of the grid, so that beta has no units
        present = format.grouped(torch.ones_like(weight))  # the last group of a row may be shorter
        params, lowest, beta = best, None, self.beta
        for _ in range(self.num_iterations):
            q_ogk = format.grouped(format.quantize(weight, params))
            error_ogk = (w_ogk - (q_ogk - format.zero_point(params))) * present
            loss = error_ogk.abs().pow(self.p).sum(-1)
            better = loss < lowest if lowest is not None else torch.ones_like(loss, dtype=torch.bool)
            lowest = torch.where(better, loss, lowest) if lowest is not None else loss
            best = {**best, "zero_point": torch.where(better, params["zero_point"], best["zero_point"])}
            zero_point = (q_ogk - w_ogk + shrink(error_ogk, beta, self.p)).sum(-1) / present.sum(-1)
            params = {**params, "zero_point": format.zero_point_code(zero_point)}
            beta *= self.kappa
        return best


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """Generalized soft threshold: argmin over e of `|e|^p + beta/2 (e - error)^2`, first-order (Chartrand 2012)."""
    magnitude = error.abs()
    threshold = (magnitude.clamp_min(1e-8)).pow(p - 1) / beta
    return error.sign() * (magnitude - threshold).clamp_min(0)
