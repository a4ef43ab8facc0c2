"""Is the compressed model as good as the original, within a tolerance? A paired test that may answer "cannot tell".

Papers:
    Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657: two one-sided tests (TOST).
    Efron 1987, JASA 82, 171: the bootstrap and its BCa interval; grouped jackknife for the acceleration.
    Hesterberg 2015, Am. Stat. 69, 371: percentiles moved outwards so that few examples behave like Student's t.
    McNemar 1947, Psychometrika 12, 153: only the examples that flipped tell two classifiers apart.
    Tango 1998, Stat. Med. 17, 891: score interval for paired proportions, sound when hardly anything flips.
    Wilson 1927, JASA 22, 209: the same for one proportion.

drop = how much worse the compressed model is, on the same examples, in units of the score. Its interval at confidence
1 - 2 alpha lies wholly below the tolerance: within. Wholly above: exceeds. Otherwise: cannot tell, and how many more
examples would settle it. Nothing but the interval decides: where a few examples cannot show a bound, it is infinite.
So each wrong claim, "within" or "exceeds", has a chance of about alpha at most. (Measured at alpha 0.05: up to 0.06
for 0/1 scores, Spearman and perplexity; up to 0.10 for a lognormal drop on 20 to 50 examples.)
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, norm, t

from tersor.core.errors import InputError
from tersor.tasks.scores import Scores, mean

POWER = 0.8  # chance of a clear answer that num_examples_needed aims at
MOST_NEEDED = 1_000_000  # num_examples_needed stops counting here
FEWEST = 20  # examples; a bootstrap of fewer does not say how bad it may be, so the interval has no upper end
FEW = 5  # examples; a bootstrap of fewer says nothing, and the interval has no ends
CONTINUITY = 0.5  # half an example: keeps Tango's one-sided error below alpha where few examples flip
NUM_GROUPS = 200  # groups left out in turn to find how skewed a statistic is
CHUNK_BYTES = 8 << 20  # rows resampled at once; ranking needs about ten times as much
GIVEN = {"target", "num_tokens"}  # columns that no model changes


@dataclass(frozen=True)
class Tolerance:
    """The largest drop one is ready to accept: a share of the original score, or a number in units of the score.

    >>> Tolerance.parse("1%"), Tolerance.parse("0.01")
    (Tolerance(value=0.01, relative=True), Tolerance(value=0.01, relative=False))
    >>> Tolerance.parse("1%").absolute(0.5), str(Tolerance.parse("0.50 %"))
    (0.005, '0.5%')
    """

    value: float
    relative: bool

    def __post_init__(self):
        if not (math.isfinite(self.value) and self.value >= 0):
            raise InputError(f"tolerance {self.value}: must be a finite number, zero or more; e.g. '1%' or '0.01'")

    @classmethod
    def parse(cls, text: str) -> "Tolerance":
        """Read "1%" (of the original score) or "0.01" (in units of the score); InputError on anything else."""
        number, relative = text.strip().removesuffix("%"), text.strip().endswith("%")
        try:
            value = float(Decimal(number.strip()) / (100 if relative else 1))
        except (ArithmeticError, ValueError):
            way_out = "write a share of the original score as '1%', or units of the score as '0.01'"
            raise InputError(f"tolerance {text!r} is not a number: {way_out}") from None
        return cls(abs(value) if value == 0 else value, relative)

    def absolute(self, original_value: float) -> float:
        """The tolerance in units of the score."""
        return self.value * abs(original_value) if self.relative else self.value

    def __str__(self) -> str:
        return f"{(Decimal(repr(self.value)) * 100).normalize():f}%" if self.relative else repr(self.value)


@dataclass(frozen=True)
class Verdict:
    """The result of a paired comparison. Drops and tolerance are in units of the score; positive drop = worse.

    Attributes:
        outcome: "within", "exceeds" or "cannot tell".
        drop_interval: two-sided, at confidence 1 - 2 alpha; infinite ends when one example is all there is.
        num_examples_needed: how many MORE examples give an answer in four of five tries if the observed drop is the
            true one (at most 1000000, which then means "that many or more"); None unless the outcome is "cannot tell".
        harmful, beneficial: examples that only the original, only the compressed model gets right (0/1 scores only).
        mcnemar_p: exact two-sided p-value of "harmful and beneficial flips are equally likely" (0/1 scores only).
    """

    outcome: str
    metric: str
    original: float
    compressed: float
    drop: float
    drop_interval: tuple[float, float]
    tolerance: float
    tolerance_text: str
    alpha: float
    num_examples: int
    num_examples_needed: int | None
    test: str
    harmful: int | None = None
    beneficial: int | None = None
    mcnemar_p: float | None = None

    def sentence(self) -> str:
        """The verdict in one line: outcome, scores, drop with its interval, tolerance and number of examples."""
        digits = 4 if self.tolerance <= 0 else min(max(4, 1 - math.floor(math.log10(self.tolerance))), 12)
        numbers = (self.original, self.compressed, self.drop, *self.drop_interval, self.tolerance)
        original, compressed, drop, low, high, tolerance = (f"{number:.{digits}f}" for number in numbers)
        line = f"{self.outcome} {self.tolerance_text}: {self.metric} {original} -> {compressed}, drop {drop} "
        line += f"({100 * (1 - 2 * self.alpha):g}% interval {low} .. {high}), tolerance {tolerance}, "
        line += f"n={self.num_examples}"
        if self.harmful is not None:
            line += f", flips {self.harmful} harmful {self.beneficial} beneficial (McNemar p={self.mcnemar_p:.2g})"
        if self.num_examples_needed is None:
            return line
        if self.num_examples_needed == MOST_NEEDED:
            return f"{line}: need {MOST_NEEDED} more examples or more"
        step = 10 ** max(0, math.floor(math.log10(self.num_examples_needed)) - 1)
        return f"{line}: need about {math.ceil(self.num_examples_needed / step) * step} more examples"

    def to_dict(self) -> dict:
        """All fields and the sentence, ready for JSON: the interval is a list, infinities are None."""
        fields = asdict(self) | {"sentence": self.sentence()}
        fields["drop_interval"] = [end if math.isfinite(end) else None for end in self.drop_interval]
        return {name: None if value in (math.inf, -math.inf) else value for name, value in fields.items()}


def interval(scores: Scores, confidence: float = 0.95, seed: int = 0, num_resamples: int = 2000) -> tuple[float, float]:
    """Two-sided confidence interval of a score, in units of the score.

    Wilson's interval for 0/1 rows, a BCa bootstrap over examples for all else. Rows that are all alike give an interval
    of zero width, a single example that is not 0/1 gives (-inf, inf). InputError on no rows or NaN.

    >>> from tersor.tasks.scores import METRICS
    >>> low, high = interval(Scores(METRICS["accuracy"], np.array([[1.0]] * 9 + [[0.0]])))
    >>> round(low, 3), round(high, 3)
    (0.596, 0.982)
    """
    _check(scores)
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence}: must lie between 0 and 1, e.g. 0.95")
    reference = not scores.metric.binary and len(np.unique(scores.examples)) == 1  # a model against itself
    if reference or not _is_binary(scores):
        return bca_interval(scores.metric.aggregate, scores.examples, confidence, seed, num_resamples)[:2]
    wilson = binomtest(int(scores.examples.sum()), scores.num_examples).proportion_ci(confidence, method="wilson")
    return float(wilson.low), float(wilson.high)


def judge(
    original: Scores,
    compressed: Scores,
    tolerance: Tolerance | str,
    alpha: float = 0.05,
    seed: int = 0,
    num_resamples=2000,
) -> Verdict:
    """Compare two models on the same examples; a wrong "within" or "exceeds" has a chance of about `alpha` each.

    A relative tolerance is taken of the observed original score. 0/1 rows are judged by Tango's interval, all else by
    a paired bootstrap. The comparison is strict: at tolerance 0 identical rows are "cannot tell", for no number of
    examples shows that nothing at all was lost. A bootstrap of fewer than 20 examples has no upper end, and so is
    never "within"; of fewer than 5 it has no lower end either. A compressed score that is infinitely bad "exceeds".
    InputError: other metric, other examples, none at all, NaN, infinite original score.

    >>> from tersor.tasks.scores import METRICS
    >>> right, flipped = np.ones((500, 1)), np.array([[0.0]] * 3 + [[1.0]] * 497)
    >>> a, b = Scores(METRICS["accuracy"], right), Scores(METRICS["accuracy"], flipped)
    >>> judge(a, b, Tolerance.parse("2%")).sentence()[:75]
    'within 2%: accuracy 1.0000 -> 0.9940, drop 0.0060 (90% interval -0.0013 .. '
    """
    if not 0 < alpha < 0.5:
        raise InputError(f"alpha {alpha}: must lie between 0 and 0.5, e.g. 0.05")
    tolerance = Tolerance.parse(tolerance) if isinstance(tolerance, str) else tolerance
    _check_pair(original, compressed)
    metric, n, sign = original.metric, original.num_examples, 1 if original.metric.higher_is_better else -1
    with np.errstate(over="ignore"):
        before, after = original.value, compressed.value
    drop, limit = sign * (before - after), tolerance.absolute(before)
    if not math.isfinite(before) or math.isnan(drop):
        raise InputError(f"{metric.name} {before} -> {after}: not a finite original score; check the rows")

    flips: dict = {}
    if math.isinf(drop):
        low, high, settle, test = drop, drop, float(n), "none: the compressed score is infinite"
    elif _is_binary(original) and _is_binary(compressed):
        change = sign * (original.examples[:, 0] - compressed.examples[:, 0])
        b, c = int((change > 0).sum()), int((change < 0).sum())
        flips = {"harmful": b, "beneficial": c, "mcnemar_p": float(binomtest(b, b + c).pvalue) if b + c else 1.0}
        low, high, settle = _judge_flips(b, c, n, limit, alpha)
        test = "Tango score interval for paired proportions, continuity corrected"
    else:
        low, high, settle = _judge_resamples(original, compressed, sign, limit, alpha, seed, num_resamples)
        test = f"paired BCa bootstrap, {num_resamples} resamples"

    rounding = 1e-12 * max(abs(before), limit)
    within, exceeds = high < limit - rounding, low > limit + rounding
    outcome = "within" if within else "exceeds" if exceeds else "cannot tell"
    needed = None if within or exceeds else int(min(max(settle - n, 1), MOST_NEEDED))
    values = (before, after, drop, (low, high), limit)
    return Verdict(outcome, metric.name, *values, str(tolerance), alpha, n, needed, test, **flips)


def _judge_flips(harmful: int, beneficial: int, n: int, limit: float, alpha: float) -> tuple[float, float, float]:
    """Interval of the drop, and the number of examples that would settle it."""
    drop = (harmful - beneficial) / n
    null = math.sqrt(_tango_variance(harmful, beneficial, n, min(limit, 1.0)))
    observed = math.sqrt((harmful + beneficial) / n - drop**2)
    spread = float(norm.isf(alpha)) * null + float(norm.ppf(POWER)) * observed
    settle = _sample_size(abs(limit - drop), spread, CONTINUITY)
    return *tango_interval(harmful, beneficial, n, 1 - 2 * alpha, CONTINUITY), settle


def _judge_resamples(original, compressed, sign, limit, alpha, seed, num_resamples) -> tuple[float, float, float]:
    """The same by bootstrap, widened as Wilson does: what n examples did not show may exist, at a rate up to z²/n."""
    rows, metric, n, z = original.examples, original.metric, original.num_examples, float(norm.isf(alpha))

    def paired(both):
        return sign * (metric.aggregate(both[..., : rows.shape[1]]) - metric.aggregate(both[..., rows.shape[1] :]))

    both = np.concatenate([rows, compressed.examples], axis=1)
    low, high, error = bca_interval(paired, both, 1 - 2 * alpha, seed, num_resamples)
    drop, sd, power, extra = float(paired(both)), error * math.sqrt(n), z + float(norm.ppf(POWER)), z**2 / 2
    if np.array_equal(rows, compressed.examples):
        # All rows equal. Floats, all distinct: the same model. A discrete score: some unseen example may differ, by as
        # much as two examples differ from each other, sd·√2.
        tied = 1 - len(np.unique(rows, axis=0)) / n
        error = bca_interval(metric.aggregate, rows, 0.9, seed, num_resamples)[2]
        sd, power, extra = tied * error * math.sqrt(2 * n), 0.0, z**2
    margin = z**2 / 2 * sd / n
    low, high = drop - margin - math.hypot(drop - low, margin), drop + margin + math.hypot(high - drop, margin)
    low, high = low if n >= FEW else -math.inf, high if n >= FEWEST else math.inf
    return low, high, max(FEWEST, _sample_size(abs(limit - drop), power * sd, extra * sd))


def _sample_size(gap: float, spread: float, extra: float) -> float:
    """Smallest n with gap·n >= spread·√n + extra, at most 1e15."""
    root = (spread + math.sqrt(spread**2 + 4 * gap * extra)) / (2 * gap) if gap > 0 else math.inf
    return math.ceil(min(1e15, root * root))


def tango_interval(harmful: int, beneficial: int, n: int, confidence=0.95, continuity=0.0) -> tuple[float, float]:
    """Score interval (Tango 1998) for (harmful - beneficial) / n, of n paired examples; `continuity` is in examples.

    >>> [round(end, 3) for end in tango_interval(1, 7, 21)]  # airway data in Fagerland, Lydersen & Laake 2014
    [-0.517, -0.026]
    """
    z, ends = float(norm.ppf((1 + confidence) / 2)), []
    for side in (-1, 1):
        inner, outer = (harmful - beneficial) / n, float(side)
        for _ in range(60):  # bisection: outer is rejected, inner is not
            middle = (inner + outer) / 2
            distance = side * (n * middle - (harmful - beneficial)) - continuity
            rejected = distance > z * math.sqrt(n * _tango_variance(harmful, beneficial, n, middle))
            inner, outer = (inner, middle) if rejected else (middle, outer)
        ends.append(outer)
    return ends[0], ends[1]


def _tango_variance(harmful: int, beneficial: int, n: int, drop: float) -> float:
    """Variance of one paired difference at a true `drop`, the rest of the table by constrained maximum likelihood."""
    half = ((2 * n - harmful + beneficial) * drop - harmful - beneficial) / (4 * n)
    rate = math.sqrt(max(half**2 + beneficial * drop * (1 - drop) / (2 * n), 0.0)) - half  # of beneficial flips
    return max(2 * rate + drop * (1 - drop), 0.0)


def bca_interval(
    statistic: Callable, rows: Float[np.ndarray, "example column"], confidence: float, seed: int, num_resamples: int
) -> tuple[float, float, float]:
    """BCa bootstrap interval and standard error of `statistic`: rows `[..., example, column]` to values `[...]`."""
    n, columns = rows.shape
    if n == 1:
        return -math.inf, math.inf, 0.0
    rng, chunk = np.random.default_rng(seed), max(1, CHUNK_BYTES // (8 * n * columns))
    with np.errstate(over="ignore", invalid="ignore"):
        estimate = float(statistic(rows))
        groups = np.array_split(rng.permutation(n), min(n, NUM_GROUPS))
        left_out = np.array([statistic(np.delete(rows, group, axis=0)) for group in groups])
        sizes = [min(chunk, num_resamples - start) for start in range(0, num_resamples, chunk)]
        values = np.concatenate([statistic(rows[rng.integers(0, n, (size, n))]) for size in sizes])
    if not np.isfinite([estimate, left_out.sum(), values.sum()]).all():
        return -math.inf, math.inf, math.inf

    influence = left_out.mean() - left_out
    cubed = float((influence**2).sum()) ** 1.5
    acceleration = float((influence**3).sum()) / (6 * cubed) if cubed > 0 else 0.0
    below = float((values < estimate).mean() + (values <= estimate).mean()) / 2
    bias = float(norm.ppf(min(max(below, 1 / num_resamples), 1 - 1 / num_resamples)))
    z = math.sqrt(n / (n - 1)) * float(t.ppf((1 + confidence) / 2, n - 1)) * np.array([-1, 1])  # Hesterberg
    shares = norm.cdf(bias + (bias + z) / np.maximum(1 - acceleration * (bias + z), 0.1))
    low, high = np.quantile(values, shares)
    return float(low), float(high), float(values.std(ddof=1))


def _is_binary(scores: Scores) -> bool:
    """0/1 rows whose mean is the score: flips can be counted, whether or not the metric says so."""
    return scores.metric.aggregate is mean and bool(np.isin(scores.examples[:, 0], (0, 1)).all())


def _check(scores: Scores) -> None:
    name = scores.metric.name
    if scores.num_examples == 0:
        raise InputError(f"{name}: no examples to judge; check the split of the task")
    if bad := int(np.isnan(scores.examples).any(axis=1).sum()):
        raise InputError(f"{name}: {bad} of {scores.num_examples} examples hold NaN; the model broke or the data did")
    if scores.metric.binary and not _is_binary(scores):
        raise InputError(f"{name}: rows of a binary metric must be 0 or 1; use a metric with binary=False")


def _check_pair(original: Scores, compressed: Scores) -> None:
    _check(original)
    _check(compressed)
    a, b, n, m = original.metric, compressed.metric, original.num_examples, compressed.num_examples
    if (a.name, a.higher_is_better, a.columns) != (b.name, b.higher_is_better, b.columns):
        raise InputError(f"cannot compare {a.name} with {b.name}: score both models with the same metric")
    if n != m:
        raise InputError(f"{a.name}: {n} examples against {m}: score both models on the same examples")
    for i, column in enumerate(a.columns):
        if column in GIVEN and not np.array_equal(original.examples[:, i], compressed.examples[:, i]):
            raise InputError(f"{a.name}: '{column}' differs between the models: score both on the same examples")
