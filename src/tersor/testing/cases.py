"""Test cases for formats, methods and input quantizers: weights, inputs and statistics like those of real models,
and extreme ones."""

from functools import cache

import torch
from torch import Tensor

from tersor.formats.contract import Format
from tersor.methods.contract import Method
from tersor.methods.stats import Stats


def random(*shape: int, seed: int = 0) -> Tensor:
    """A tensor of Gaussian numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def odd_weights() -> dict[str, Tensor]:
    """Weight matrices of unusual content, by a description of it."""
    outliers = random(6, 256, seed=1)
    outliers[0, 3], outliers[2, 200], outliers[5, 0] = 300.0, -70.0, 1000.0
    islands = random(4, 256, seed=2)
    islands[0], islands[1, :128], islands[2, 64:] = 0.0, 0.0, 0.0
    return {
        "gaussian": 0.02 * random(8, 128),
        "heavy tails": 0.02 * random(8, 128, seed=3) / random(8, 128, seed=4).abs().clamp_min(0.01),
        "outliers": outliers,
        "whole numbers": random(4, 128, seed=5).mul(3).round(),
        "rounded to fp16": random(4, 128, seed=6).half().float(),
        "rounded to bf16": random(4, 128, seed=7).bfloat16().float(),
        "zeros": torch.zeros(4, 128),
        "groups of zeros": islands,
        "constant": torch.full((4, 128), 0.37),
        "all positive": random(4, 128, seed=8).abs() + 0.5,
        "all negative": -random(4, 128, seed=9).abs() - 0.5,
        "tiny": 1e-6 * random(4, 128, seed=10),
        "where fp16 scales are coarse": -torch.logspace(-8, -3, 24).view(24, 1) * (1 + random(24, 128, seed=16).abs()),
        "huge": 1e4 * random(4, 128, seed=11).clamp(-6, 6),
        "single row": random(1, 128, seed=12),
        "odd columns": random(5, 37, seed=13),
        "single column": random(7, 1, seed=14),
        "single weight": random(1, 1, seed=15),
    }


def weights_for(format: Format) -> dict[str, Tensor]:
    """The odd weights that the format holds."""
    wide = {name: widened(weight, format) for name, weight in odd_weights().items()}
    return {name: w for name, w in wide.items() if format.why_not((w.shape[0], w.shape[1])) is None}


def widened(weight: Tensor, format: Format) -> Tensor:
    """The weight; where the format wants more columns and the rows are even, two rows side by side."""
    num_rows, num_columns = weight.shape
    if format.why_not((num_rows, num_columns)) is None or num_rows % 2:
        return weight
    return weight.reshape(num_rows // 2, 2 * num_columns)


def inputs() -> dict[str, Tensor]:
    """Inputs of a layer, `[..., in]`, with a token in each row."""
    outliers = random(6, 128, seed=20)
    outliers[2, 5] = 500.0
    return {
        "one token": random(1, 128, seed=21),
        "a vector": random(128, seed=22),
        "tokens": random(33, 128, seed=23),
        "a batch": random(2, 5, 128, seed=24),
        "two axes of batch": random(2, 3, 4, 128, seed=25),
        "an outlier token": outliers,
        "a zero token": torch.cat([random(2, 128, seed=26), torch.zeros(1, 128)]),
        "tiny": 1e-6 * random(3, 128, seed=27),
        "no token": torch.zeros(0, 128),
        "no token in a batch": torch.zeros(2, 0, 128),
    }


def stats_for(weight: Tensor) -> dict[str, Stats]:
    """None, and what calibration could give, with columns that never fire."""
    rows, columns = random(weight.shape[0], seed=30).square(), random(weight.shape[1], seed=31).square()
    columns[::3] = 0
    columns /= columns.mean().clamp_min(1e-6)
    curvature = Stats(row_weight=rows, column_weight=columns)
    return {"no data": Stats(), "curvature": curvature, "moments": moments(weight.shape[1])}


@cache
def moments(num_columns: int) -> Stats:
    """Moments of a dozen correlated inputs that drifted from the original's: singular, some features never fire."""
    original = random(12, num_columns, seed=33) @ random(num_columns, num_columns, seed=34) / num_columns**0.5
    original[:, ::5] = 0
    x = original + 0.1 * original.roll(1, dims=0)
    return Stats(
        second_moment=x.t() @ x / len(x),
        cross_moment=original.t() @ x / len(x),
        mean=x.mean(0),
        largest=x.abs().amax(0),
        sample=x,
        num_tokens=len(x),
    )


def cases_for(method: Method, format: Format) -> dict[str, tuple[Tensor, Stats]]:
    """Every odd weight that the format holds, without data and with all that the method reads."""
    cases = {}
    for label, weight in weights_for(format).items():
        for kind, stats in stats_for(weight).items():
            measured = {name for name, value in vars(stats).items() if value is not None}
            if kind == "no data" or method.needs & measured:
                cases[f"{label}, {kind}"] = (weight, stats)
    return cases


def importance(weight: Tensor, stats: Stats) -> Tensor:
    """The weight of an error in each column `[in]`, with a mean of one and 1 % of that added.

    It is the energy of the inputs where that is known, else the curvature.
    """
    energy = stats.column_weight if stats.second_moment is None else stats.second_moment.diagonal()
    if energy is None or not energy.any():
        return torch.ones(weight.shape[1])
    return energy / energy.mean() + 0.01
