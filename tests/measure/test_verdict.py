"""The promise: a wrong "within" or "exceeds" happens with a chance of at most about alpha. Checked by planting drops.

0/1 scores: exact, by summing the probability of every table. All else: simulation, with the true drop known from
theory or from a huge sample. A simulated rate may exceed what is allowed only by Monte-Carlo error (p = 0.001).
"""

import json
import math
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, multinomial, norm

from tersor.core.errors import InputError
from tersor.measure.verdict import FEWEST, MOST_NEEDED, Tolerance, Verdict, interval, judge, tango_interval
from tersor.tasks.scores import METRICS, Metric, Scores, perplexity, spearman

ALPHA = 0.05


# Planted worlds: (metric, columns, draw(rng, n) -> rows of original and compressed side by side).


def exponential(rng, n):
    base = rng.normal(size=n)
    return np.stack([base, base - rng.exponential(1.0, n)], axis=1)


def lognormal(rng, n):
    base = rng.normal(size=n)
    return np.stack([base, base - rng.lognormal(0.0, 1.0, n)], axis=1)


def graded(rng, n):
    """One example in twenty loses half a point, of scores 0, 0.5, 1, 1.5."""
    base = rng.integers(1, 4, n) / 2
    return np.stack([base, base - 0.5 * (rng.random(n) < 0.05)], axis=1)


def similarity(rng, n, noise=0.25):
    target = rng.normal(size=n)
    predicted = 0.8 * target + 0.6 * rng.normal(size=n)
    return np.stack([predicted, target, predicted + noise * rng.normal(size=n), target], axis=1)


def language(rng, n):
    tokens = rng.integers(20, 200, n).astype(float)
    loss = 3 + 0.6 * rng.normal(size=n)
    more = 0.05 * rng.exponential(1.0, n) - 0.03 + 0.03 * rng.normal(size=n)
    return np.stack([tokens * loss, tokens, tokens * (loss + more), tokens], axis=1)


WORLDS = {
    "exponential": ("mean", exponential),
    "lognormal": ("mean", lognormal),
    "graded": ("mean", graded),
    "similarity": ("spearman", similarity),
    "language": ("perplexity", language),
}


def pair(metric, rows):
    half = rows.shape[1] // 2
    return Scores(METRICS[metric], rows[:, :half]), Scores(METRICS[metric], rows[:, half:])


@cache
def true_drop(world):
    exact = {"exponential": 1.0, "lognormal": np.exp(0.5), "graded": 0.025}
    if world in exact:
        return float(exact[world])
    rng, (_, draw) = np.random.default_rng(123), WORLDS[world]
    rows = draw(rng, 500_000)
    if world == "similarity":
        return float(spearman(rows[:, :2]) - spearman(rows[:, 2:]))
    return float(perplexity(rows[:, 2:]) - perplexity(rows[:, :2]))


def rates(world, n, runs, tolerance, num_resamples=400):
    metric, draw = WORLDS[world]
    rng = np.random.default_rng(n)
    outcomes = [
        judge(*pair(metric, draw(rng, n)), Tolerance(tolerance, False), ALPHA, run, num_resamples).outcome
        for run in range(runs)
    ]
    return outcomes.count("within"), outcomes.count("exceeds")


def check_errors(world, n, runs, allowed):
    within, exceeds = rates(world, n, runs, true_drop(world))
    bound = binom.isf(0.001, runs, allowed)
    print(f"{world} n={n}: within {within / runs:.3f} exceeds {exceeds / runs:.3f} allowed {bound / runs:.3f}")
    assert within <= bound
    assert exceeds <= bound


# 1, 2: false accepts and false rejects, the true drop being exactly the tolerance


@pytest.mark.parametrize(
    ("world", "n", "runs"),
    [
        ("exponential", 50, 400),
        ("lognormal", 200, 300),
        ("graded", 60, 400),
        ("graded", 300, 300),
        ("similarity", 100, 50),
        ("language", 100, 300),
    ],
)
def test_drop_at_the_tolerance_is_rarely_decided(world, n, runs):
    check_errors(world, n, runs, ALPHA)


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 50, 100, 300, 1000])
@pytest.mark.parametrize("world", WORLDS)
def test_drop_at_the_tolerance_is_rarely_decided_precisely(world, n):
    """2000 runs see what the quick test cannot: few and very skewed differences cost one or two per cent more."""
    few_or_wild = (0.10 if n < 100 else 0.07) if world == "lognormal" else 0.07 if n <= 50 else 0.055
    check_errors(world, n, 600 if world == "similarity" and n > 100 else 2000, few_or_wild)


def table_probabilities(n, p, q):
    """All likely (harmful, beneficial) of n examples that flip with chances p and q, with their probabilities."""
    b, c = (np.arange(binom.isf(1e-7, n, rate) + 1, dtype=int) for rate in (p, q))
    tables = np.array([(i, j) for i in b for j in c if i + j <= n])
    weight = multinomial.pmf(np.column_stack([tables, n - tables.sum(1)]), n, [p, q, 1 - p - q])
    keep = weight > 1e-7
    return tables[keep], weight[keep]


@pytest.mark.parametrize(("n", "drop"), [(100, 0.01), (100, 0.05), (300, 0.01), (300, 0.02), (1000, 0.01)])
@pytest.mark.parametrize("both_ways", [0.0, 0.01, 0.05])
def test_flips_at_the_tolerance_are_rarely_decided(n, drop, both_ways):
    within = exceeds = 0.0
    for (b, c), weight in zip(*table_probabilities(n, drop + both_ways / 2, both_ways / 2), strict=True):
        low, high = tango_interval(b, c, n, 1 - 2 * ALPHA, continuity=0.5)
        within += weight * (high < drop)
        exceeds += weight * (low > drop)
    assert within <= ALPHA
    assert exceeds <= 1.15 * ALPHA  # 0.0575: the price of discreteness; Tango without continuity reaches 0.088


def flipped(harmful, beneficial, n, right=0.6):
    """0/1 rows with exactly these flips."""
    original = np.zeros(n)
    original[: max(round(right * n), harmful)] = 1
    compressed = original.copy()
    compressed[:harmful] = 0
    if beneficial:
        compressed[-beneficial:] = 1
    accuracy = METRICS["accuracy"]
    return Scores(accuracy, original[:, None]), Scores(accuracy, compressed[:, None])


def test_judge_decides_flips_by_tango():
    for b, c, n in [(3, 1, 200), (0, 0, 400), (40, 5, 300), (9, 9, 1000)]:
        verdict = judge(*flipped(b, c, n), Tolerance.parse("0.01"))
        low, high = tango_interval(b, c, n, 0.90, continuity=0.5)
        assert verdict.drop_interval == (low, high)
        assert verdict.outcome == ("within" if high < 0.01 else "exceeds" if low > 0.01 else "cannot tell")


# 3: power


@pytest.mark.parametrize(
    ("world", "n"), [("exponential", 400), ("graded", 800), ("similarity", 1000), ("language", 400)]
)
def test_clear_cases_are_decided(world, n):
    runs = 10 if world == "similarity" else 20
    within, _ = rates(world, n, runs, 2 * true_drop(world))
    _, exceeds = rates(world, n, runs, 0.3 * true_drop(world))
    assert within >= 0.9 * runs
    assert exceeds >= 0.9 * runs


def test_no_true_drop_is_within():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1000, 1))
    rows = np.hstack([base, base + 0.1 * rng.normal(size=(1000, 1))])
    assert judge(*pair("mean", rows), Tolerance(0.02, False)).outcome == "within"
    assert judge(*flipped(5, 5, 1500), Tolerance.parse("1%")).outcome == "within"
    assert judge(*flipped(90, 10, 1500), Tolerance.parse("1%")).outcome == "exceeds"


# 4: coverage of one score's interval


@pytest.mark.parametrize(
    ("metric", "columns", "world", "n", "runs"),
    [
        ("mean", [0], "exponential", 100, 200),
        ("mean", "drop", "exponential", 100, 200),
        ("spearman", [0, 1], "similarity", 100, 100),
        ("perplexity", [0, 1], "language", 100, 200),
        pytest.param("mean", "drop", "exponential", 100, 4000, marks=pytest.mark.slow),
        pytest.param("spearman", [0, 1], "similarity", 100, 2000, marks=pytest.mark.slow),
        pytest.param("spearman", [0, 1], "similarity", 1500, 400, marks=pytest.mark.slow),
        pytest.param("perplexity", [0, 1], "language", 100, 4000, marks=pytest.mark.slow),
    ],
)
def test_interval_covers(metric, columns, world, n, runs):
    def rows(rng, n):
        both = WORLDS[world][1](rng, n)
        return both[:, :1] - both[:, 1:2] if columns == "drop" else both[:, columns]

    rng = np.random.default_rng(n)
    truth = float(METRICS[metric].aggregate(rows(np.random.default_rng(77), 500_000)))
    truth = {("mean", False): 0.0, ("mean", True): 1.0}.get((metric, columns == "drop"), truth)
    hits = 0
    for run in range(runs):
        low, high = interval(Scores(METRICS[metric], rows(rng, n)), seed=run, num_resamples=500)
        hits += low <= truth <= high
    print(f"coverage {metric} {columns} {world} n={n}: {hits / runs:.3f}")
    assert binom.isf(0.999, runs, 0.94) <= hits <= binom.isf(0.001, runs, 0.96)


@pytest.mark.parametrize(("n", "rate"), [(50, 0.9), (1000, 0.98)])
def test_binary_interval_covers(n, rate):
    covered = 0.0
    for right in range(n + 1):
        if binom.pmf(right, n, rate) > 1e-9:
            low, high = interval(flipped(0, 0, n, right / n)[0])
            covered += binom.pmf(right, n, rate) * (low <= rate <= high)
    assert 0.93 <= covered <= 0.975


# 5: McNemar and Tango against slow versions


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 6), (5, 12), (12, 5), (30, 30)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    verdict = judge(*flipped(b, c, 100), Tolerance.parse("1%"))
    assert (verdict.harmful, verdict.beneficial) == (b, c)
    assert verdict.mcnemar_p == pytest.approx(binomtest(b, b + c, 0.5).pvalue if b + c else 1.0)
    assert verdict.drop == pytest.approx((b - c) / 100)


def tango_textbook(b, c, n, confidence):
    """Score interval by the book: maximise the trinomial likelihood numerically at every drop, solve |score| = z."""
    z = norm.ppf((1 + confidence) / 2)

    def excess(drop, side):
        def negative_log_likelihood(q):
            chances = np.maximum([q + drop, q, 1 - 2 * q - drop], 1e-300)
            return -np.dot([b, c, n - b - c], np.log(chances))

        span = (max(0, -drop), (1 - drop) / 2)
        q = minimize_scalar(negative_log_likelihood, bounds=span, method="bounded", options={"xatol": 1e-13}).x
        return side * (n * drop - (b - c)) - z * np.sqrt(max(n * (2 * q + drop - drop**2), 0))

    point = (b - c) / n
    return brentq(excess, -1 + 1e-9, point, args=(-1,)), brentq(excess, point, 1 - 1e-9, args=(1,))


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (7, 1, 21), (3, 5, 100), (20, 11, 300), (0, 4, 50), (0, 0, 30)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_tango_agrees_with_the_textbook(b, c, n, confidence):
    assert tango_interval(b, c, n, confidence) == pytest.approx(tango_textbook(b, c, n, confidence), abs=1e-4)


def test_tango_published_example():
    """Airway hyper-responsiveness before and after stem cell transplantation: 1 and 7 flips of 21 children."""
    assert tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_edges():
    low, high = tango_interval(0, 0, 50, 0.9)
    z = norm.ppf(0.95)
    assert high == pytest.approx(z**2 / (50 + z**2))  # by hand: n d² / (d (1 - d)) = z²
    assert low == pytest.approx(-high)
    for b, c, n in [(1, 0, 1), (0, 1, 1), (0, 0, 1), (5, 0, 5), (0, 3, 3)]:
        low, high = tango_interval(b, c, n, 0.9, continuity=0.5)
        assert -1 <= low < high <= 1
        assert low <= (b - c) / n <= high
        mirrored = tango_interval(c, b, n, 0.9, continuity=0.5)
        assert mirrored == pytest.approx((-high, -low))


# 6: with as many examples as it asks for, an answer comes in about four of five tries


@pytest.mark.parametrize(("b", "c", "n", "limit"), [(2, 1, 150, 0.03), (6, 2, 200, 0.01), (1, 1, 60, 0.05)])
def test_flips_needed_give_the_power(b, c, n, limit):
    pilot = judge(*flipped(b, c, n), Tolerance(limit, False))
    assert pilot.outcome == "cannot tell"
    total = n + pilot.num_examples_needed
    tables, weights = table_probabilities(total, b / n, c / n)
    wanted = 0.0
    for (i, j), weight in zip(tables, weights, strict=True):
        low, high = tango_interval(i, j, total, 0.9, continuity=0.5)
        wanted += weight * (high < limit if (b - c) / n < limit else low > limit)
    assert 0.6 <= wanted <= 0.95


@pytest.mark.parametrize("limit", [0.07, 0.03])
def test_examples_needed_give_the_power(limit):
    rng = np.random.default_rng(5)

    def rows(n, typical=False):
        drop = rng.normal(size=n)
        if typical:
            drop = (drop - drop.mean()) / drop.std()
        base = rng.normal(size=n)
        return pair("mean", np.stack([base, base - (0.05 + 0.1 * drop)], axis=1))

    pilot = judge(*rows(40, typical=True), Tolerance(limit, False))
    assert pilot.outcome == "cannot tell"
    total = 40 + pilot.num_examples_needed
    answers = [judge(*rows(total), Tolerance(limit, False), seed=i, num_resamples=400).outcome for i in range(150)]
    wanted = answers.count("within" if limit > 0.05 else "exceeds") / len(answers)
    assert 0.65 <= wanted <= 0.93


def test_identical_flips_ask_for_enough():
    pilot = judge(*flipped(0, 0, 100), Tolerance.parse("0.01"))
    assert pilot.outcome == "cannot tell"
    assert judge(*flipped(0, 0, 100 + pilot.num_examples_needed), Tolerance.parse("0.01")).outcome == "within"


# 7: small, degenerate and wrong inputs


def test_few_examples_show_what_is_far_above_the_tolerance():
    """Eight examples that all lose a half: the interval is above the tolerance, and the verdict says so."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(8, 1))
    metric = METRICS["mean"]
    worse = Scores(metric, base - 0.5 - 0.05 * rng.normal(size=(8, 1)))
    verdict = judge(Scores(metric, base), worse, "0.02")
    assert verdict.outcome == "exceeds"
    assert verdict.drop_interval[0] > 0.3
    assert verdict.drop_interval[1] == math.inf, "how bad it may be, eight examples do not tell"
    assert verdict.num_examples_needed is None
    four = judge(Scores(metric, base[:4]), Scores(metric, worse.examples[:4]), "0.02")
    assert (four.outcome, four.drop_interval) == ("cannot tell", (-math.inf, math.inf))


@pytest.mark.parametrize("metric", ["mean", "loss", "spearman", "perplexity", "accuracy"])
def test_the_verdict_is_what_the_interval_says(metric):
    """Whatever the examples, however few: never `cannot tell` beside an interval on one side of the tolerance."""
    rng = np.random.default_rng(3)
    found = METRICS[metric]
    seen = set()
    for n in (1, 2, 4, 5, 8, 19, 20, 40):
        for loss in (0.0, 0.01, 0.3, 3.0):
            rows = rng.normal(2, 0.5, (n, len(found.columns)))
            if metric == "accuracy":
                rows = (rows > 1.8).astype(float)
                other = np.where(rng.random(rows.shape) < loss / 3, 0.0, rows)
            else:
                worse = loss * (1 if found.higher_is_better else -1) * (1 + 0.1 * rng.normal(size=n))
                other = rows.copy()
                other[:, 0] -= worse * (rng.random(n) if metric == "spearman" else 1)
            if metric in ("perplexity", "spearman"):
                rows[:, 1] = other[:, 1] = 10.0 if metric == "perplexity" else rng.normal(size=n)
            verdict = judge(Scores(found, rows), Scores(found, other), "0.1", num_resamples=200)
            low, high = verdict.drop_interval
            seen.add(verdict.outcome)
            assert (verdict.outcome == "within") == (high < verdict.tolerance)
            assert (verdict.outcome == "exceeds") == (low > verdict.tolerance)
            assert (verdict.num_examples_needed is None) == (verdict.outcome != "cannot tell")
    assert {"within", "cannot tell"} <= seen


def test_few_examples_are_never_within():
    rng = np.random.default_rng(0)
    for n in range(1, FEWEST):
        for metric, width in (("mean", 1), ("spearman", 2)):
            base = rng.normal(size=(n, width))
            scores = Scores(METRICS[metric], base)
            verdict = judge(scores, scores, Tolerance.parse("0.5"))
            assert verdict.outcome == "cannot tell"
            assert verdict.num_examples_needed >= FEWEST - n
            json.dumps(verdict.to_dict(), allow_nan=False)


def test_identical_rows():
    rng = np.random.default_rng(0)
    distinct = Scores(METRICS["perplexity"], np.stack([rng.normal(100, 9, 64), np.full(64, 40.0)], axis=1))
    assert judge(distinct, distinct, Tolerance.parse("1%")).outcome == "within"
    nothing = judge(distinct, distinct, Tolerance.parse("0"))
    assert (nothing.outcome, nothing.num_examples_needed) == ("cannot tell", MOST_NEEDED)
    graded_scores = Scores(METRICS["mean"], rng.integers(0, 3, (64, 1)) / 2)
    unsure = judge(graded_scores, graded_scores, Tolerance.parse("1%"))
    assert unsure.outcome == "cannot tell"
    copies = 2 + int(1.2 * unsure.num_examples_needed / 64)
    more = replace(graded_scores, examples=np.tile(graded_scores.examples, (copies, 1)))
    assert judge(more, more, Tolerance.parse("1%")).outcome == "within"


def test_constant_difference_at_the_tolerance_is_not_decided_by_rounding():
    base = np.random.default_rng(0).normal(size=(200, 1))
    verdict = judge(*pair("mean", np.hstack([base, base - 0.1])), Tolerance.parse("0.1"))
    assert verdict.outcome == "cannot tell"
    assert judge(*pair("mean", np.hstack([base, base - 0.1])), Tolerance.parse("0.11")).outcome == "within"


def test_zero_one_agreement_is_judged_by_flips():
    """A metric that is not marked binary but has 0/1 rows: no disagreement in 100 does not show less than 1%."""
    agreement = Scores(METRICS["agreement"], np.ones((100, 1)))
    verdict = judge(agreement, agreement, Tolerance.parse("1%"))
    assert verdict.outcome == "cannot tell"
    assert verdict.harmful == 0


def test_lower_is_better_turns_the_sign():
    base = np.random.default_rng(0).normal(size=(200, 1))
    assert judge(*pair("loss", np.hstack([base, base + 0.1])), Tolerance.parse("0.01")).outcome == "exceeds"
    assert judge(*pair("loss", np.hstack([base, base - 0.1])), Tolerance.parse("0.01")).outcome == "within"
    error_rate = Metric("error", ("wrong",), METRICS["accuracy"].aggregate, higher_is_better=False, binary=True)
    a, b = (replace(scores, metric=error_rate) for scores in flipped(0, 30, 200))
    verdict = judge(a, b, Tolerance.parse("0.01"))
    assert (verdict.harmful, verdict.beneficial, verdict.outcome) == (30, 0, "exceeds")


def test_infinitely_bad_exceeds():
    base = np.random.default_rng(0).normal(size=(50, 1))
    broken = np.full((50, 1), np.inf)
    verdict = judge(*pair("loss", np.hstack([base, broken])), Tolerance.parse("1%"))
    assert verdict.outcome == "exceeds"
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert interval(Scores(METRICS["loss"], broken)) == (-np.inf, np.inf)
    with pytest.raises(InputError, match="finite"):
        judge(*pair("loss", np.hstack([broken, base])), Tolerance.parse("1%"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_interval_of_few_or_constant_rows(metric, n):
    low, high = interval(Scores(METRICS[metric], np.ones((n, len(METRICS[metric].columns)))))
    assert low <= high


def test_large_and_fast():
    rng = np.random.default_rng(0)
    low, high = interval(Scores(METRICS["mean"], rng.normal(size=(50_000, 1))), num_resamples=200)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(50_000), rel=0.2)
    scores = pair("spearman", similarity(rng, 1500))
    start = time.process_time()
    first = judge(*scores, Tolerance.parse("1%"))
    assert time.process_time() - start < 10
    assert judge(*scores, Tolerance.parse("1%")) == first


def test_errors():
    rows = np.arange(40.0)[:, None]
    a = Scores(METRICS["mean"], rows)
    tolerance = Tolerance.parse("1%")
    with pytest.raises(InputError, match="mean with loss"):
        judge(a, Scores(METRICS["loss"], rows), tolerance)
    with pytest.raises(InputError, match="40 examples against 39"):
        judge(a, Scores(METRICS["mean"], rows[1:]), tolerance)
    with pytest.raises(InputError, match="1 of 40 examples hold NaN"):
        judge(a, Scores(METRICS["mean"], np.where(rows == 3, np.nan, rows)), tolerance)
    with pytest.raises(InputError, match="no examples"):
        interval(Scores(METRICS["mean"], rows[:0]))
    with pytest.raises(InputError, match="0 or 1"):
        interval(Scores(METRICS["accuracy"], rows))
    with pytest.raises(InputError, match=r"alpha 0\.5"):
        judge(a, a, tolerance, alpha=0.5)
    with pytest.raises(InputError, match="confidence 95"):
        interval(a, confidence=95)
    both = Scores(METRICS["spearman"], np.hstack([rows, rows]))
    with pytest.raises(InputError, match="'target' differs"):
        judge(both, Scores(METRICS["spearman"], np.hstack([rows, -rows])), tolerance)


@pytest.mark.parametrize(
    "text", ["", "%", "one", "-1%", "-0.1", "nan", "nan%", "inf", "1e400", "1%%", "1 2", "1e999999999%"]
)
def test_bad_tolerance(text):
    with pytest.raises(InputError, match="'1%'"):
        Tolerance.parse(text)


@given(st.floats(min_value=0, max_value=1e300), st.booleans())
def test_tolerance_round_trip(value, relative):
    tolerance = Tolerance(value, relative)
    assert Tolerance.parse(str(tolerance)) == tolerance


@given(st.decimals(min_value=0, max_value=1000, places=4), st.booleans())
def test_tolerance_reads_what_is_written(number, relative):
    tolerance = Tolerance.parse(f"{number}%" if relative else f"{number}")
    assert tolerance.relative == relative
    assert tolerance.absolute(-2.0) == pytest.approx(float(number) * (0.02 if relative else 1))


# sentences


def test_sentence():
    verdict = Verdict(
        "within", "spearman", 0.8196, 0.8171, 0.0025, (0.0004, 0.0047), 0.008196, "1%", 0.05, 1436, None, "bootstrap"
    )
    assert verdict.sentence() == (
        "within 1%: spearman 0.8196 -> 0.8171, drop 0.0025 (90% interval 0.0004 .. 0.0047), tolerance 0.0082, n=1436"
    )
    unsure = replace(verdict, outcome="cannot tell", num_examples_needed=861)
    assert unsure.sentence().endswith("n=1436: need about 870 more examples")
    assert replace(unsure, num_examples_needed=MOST_NEEDED).sentence().endswith("need 1000000 more examples or more")
    assert json.loads(json.dumps(verdict.to_dict()))["drop_interval"] == [0.0004, 0.0047]
    assert (
        "flips 3 harmful 1 beneficial (McNemar p=0.62)" in judge(*flipped(3, 1, 200), Tolerance.parse("1%")).sentence()
    )
