"""Scores of a task: one row per example, and the metric that aggregates them.

Every comparison in tersor is paired: the original and the compressed model are scored on the same examples, and the
rows are kept. A metric is therefore a function of rows, so that a bootstrap can recompute it on resampled examples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

Rows = Float[np.ndarray, "*sample example column"]
Values = Float[np.ndarray, "*sample"] | np.floating


@dataclass(frozen=True)
class Metric:
    """A number computed from per-example rows.

    Attributes:
        name: the name in tables.
        columns: names of what the columns of one row hold.
        aggregate: rows `[..., example, column]` to values `[...]`; leading axes are bootstrap resamples.
        higher_is_better: the direction of "better".
        binary: one column of 0/1 per example, so that exact paired tests (McNemar) apply.
    """

    name: str
    columns: tuple[str, ...]
    aggregate: Callable[[Rows], Values]
    higher_is_better: bool = True
    binary: bool = False


def mean(rows: Rows) -> Values:
    """Mean of the first column."""
    return rows[..., 0].mean(axis=-1)


def spearman(rows: Rows) -> Values:
    """Spearman's rank correlation of column 0 with column 1, ties averaged.

    >>> spearman(np.array([[1.0, 10], [2, 20], [3, 5]])).round(3)
    np.float64(-0.5)
    """
    ranks = rankdata(rows, axis=-2)
    ranks = ranks - ranks.mean(axis=-2, keepdims=True)
    a, b = ranks[..., 0], ranks[..., 1]
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), norm, out=np.zeros_like(norm), where=norm > 0)[()]


def perplexity(rows: Rows) -> Values:
    """exp of the total negative log-likelihood (column 0, nats) per predicted token (column 1)."""
    return np.exp(rows[..., 0].sum(-1) / rows[..., 1].sum(-1))


METRICS = {
    metric.name: metric
    for metric in [
        Metric("accuracy", ("correct",), mean, binary=True),
        Metric("spearman", ("predicted", "target"), spearman),
        Metric("perplexity", ("nll", "num_tokens"), perplexity, higher_is_better=False),
        Metric("agreement", ("top1_agreement",), mean),
        Metric("cosine", ("cosine",), mean),
        Metric("explained", ("explained_variance",), mean),
        Metric("mean", ("score",), mean),
        Metric("loss", ("loss",), mean, higher_is_better=False),
    ]
}


@dataclass(frozen=True)
class Scores:
    """Per-example rows of one model on one task, and what else was measured on the way.

    >>> Scores(METRICS["accuracy"], np.array([[1.0], [0.0], [1.0], [1.0]])).value
    0.75
    """

    metric: Metric
    examples: Float[np.ndarray, "example column"]
    extras: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return float(self.metric.aggregate(self.examples))

    @property
    def num_examples(self) -> int:
        return len(self.examples)
