"""Timing takes no longer than it may, by a clock that only the timed models move."""

from functools import partial

import numpy as np
import pytest
import torch
from still_clock import Clock
from torch import nn

from tersor.jobs import decode
from tersor.jobs.bench import Candidate
from tersor.jobs.settings import Timing
from tersor.measure import scorecard
from tersor.measure.latency import MINUTE, TimeLimit, expected, measure_calls, ratio_interval
from tersor.measure.scorecard import Subject, measure
from tersor.tasks.contract import Task
from tersor.tasks.scores import METRICS, Scores
from zoo import ZOO


@pytest.mark.parametrize(
    ("pass_seconds", "limit", "rounds", "calls"),
    [(0.01, 4.0, 60, 62), (0.4, 4.0, 8, 10), (1.0, 4.0, 3, 4), (3.0, 4.0, 2, 2), (9.0, 4.0, 2, 2)],
)
def test_rounds_end_in_time_and_two_are_always_made(clock, pass_seconds, limit, rounds, calls):
    made = []

    def call():
        made.append(clock.take(pass_seconds))

    (found,) = measure_calls([call], batch_size=1, seconds=limit, clock=clock, wall=clock)
    assert (found.num_rounds, len(made)) == (rounds, calls)
    assert clock.now <= max(limit, 2 * pass_seconds)
    assert found.p50 == pytest.approx(1e3 * pass_seconds)


def test_a_slow_call_is_timed_eight_times_where_there_is_time(clock):
    call = partial(clock.take, 1.0)
    found = [measure_calls([call], batch_size=1, seconds=4, most_seconds=each, wall=clock)[0] for each in (4, 7, 60)]
    assert [each.num_rounds for each in found] == [3, 6, 8]


def test_a_few_rounds_give_the_interval_of_student():
    ratios = np.exp(np.array([[0.0, 0.1], [0.0, 0.3]]))
    low, high = ratio_interval(ratios, np.random.default_rng(0))
    margin = 12.706 * 0.1  # t of one degree of freedom, times 0.1414 / sqrt(2)
    assert low == pytest.approx(np.exp([0, 0.2 - margin]), rel=1e-3)
    assert high == pytest.approx(np.exp([0, 0.2 + margin]), rel=1e-3)


def test_the_limit_is_the_work_and_a_minute_at_most():
    clock = Clock()
    assert TimeLimit(work=7.0).left == 7
    assert TimeLimit(work=700.0).left == MINUTE == 60
    assert TimeLimit(300.0, work=7.0).left == 300
    limit = TimeLimit(work=10.0, clock=clock)
    assert limit.share(2) == (4, 5)  # more rounds than fit into that are of no use
    with limit.counting():
        clock.take(6)
    clock.take(100)  # other work
    assert (limit.left, limit.share(2)) == (4, (2, 2))
    assert limit.refusal("batch 32", 4.0) is None
    assert limit.refusal("batch 32", 90.0) == (
        "batch 32 is not timed: it would take 90 s or more, and 4 s are left for timing"
    )
    assert TimeLimit(300.0).share(2) == (150, 150)


class Slow(nn.Module):
    """Takes some seconds for every row."""

    def __init__(self, clock: Clock, seconds: float):
        super().__init__()
        self.layer, self.clock, self.seconds = nn.Linear(4, 2), clock, seconds

    def forward(self, x):
        self.clock.take(self.seconds * len(x))
        return self.layer(x)


class Rows(Task):
    """Forty rows."""

    def batches(self, split, batch_size=None):
        yield torch.ones(min(batch_size or 40, 40), 4)

    def forward(self, model, batch):
        return model(batch)


@pytest.mark.parametrize(
    ("seconds", "limit", "timed"),
    [
        ((0.001, 0.001), None, [1, 32]),
        ((0.5, 0.2), None, [1]),  # 32 rows take 22.4 s, four times for both
        ((0.5, 0.2), 150.0, [1, 32]),
        ((0.01, 5.0), None, [1]),
    ],
)
def test_a_batch_that_takes_too_long_is_left_out_and_said(clock, seconds, limit, timed):
    models = [Slow(clock, each) for each in seconds]
    subjects = [Subject(str(each), model, 40) for each, model in zip(seconds, models, strict=True)]
    scores = [Scores(METRICS["accuracy"], np.ones((40, 1)))] * 2
    first, second = measure(subjects, scores, Rows(), limit=TimeLimit(limit, clock=clock))
    assert [each.batch_size for each in first.latency] == [each.batch_size for each in second.latency] == timed
    assert second.latency[0].speedup == pytest.approx(seconds[0] / seconds[1])
    if len(timed) == 2:
        assert first.untimed == ()
    else:
        (said,) = first.untimed
        needed = 4 * 32 * sum(seconds)
        assert said.startswith(f"batch 32 is not timed: it would take {needed:.0f} s or more, and ")
        assert said.endswith(f"; --timing-seconds {np.ceil(needed):.0f} times it")


def test_what_other_batches_take_is_in_proportion(clock):
    calls = [partial(clock.take, 1.0), partial(clock.take, 3.0)]
    found = measure_calls(calls, batch_size=2, seconds=10, clock=clock, wall=clock)
    assert expected(found, 32, num_calls=3) == pytest.approx(3 * 16 * 4)
    assert expected([], 32) == 0


class SlowDecoder:
    """Takes some seconds for every token."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds, self.length, self.longest = clock, seconds, 0, 0

    def reset(self):
        self.length = 0

    def feed(self, ids, mask=None):
        self.clock.take(self.seconds * (1 + ids.shape[1] / 64))
        self.length += ids.shape[1]
        self.longest = max(self.longest, self.length)


@pytest.mark.parametrize(("seconds", "num_new"), [(0.001, 64), (0.05, 64), (1.0, 4)])
def test_a_slow_decoder_writes_fewer_tokens(clock, monkeypatch, seconds, num_new):
    decoder = SlowDecoder(clock, seconds)
    monkeypatch.setattr(decode, "open_decoder", lambda *_, **__: decoder)
    found = decode.decode([Candidate("slow", "torch")], timing=Timing(memory=False))
    assert found.num_new == num_new
    assert clock.now < MINUTE
    (timing,) = found.timings
    assert timing.token.p50 == pytest.approx(1e3 * seconds * (1 + 1 / 64))
    assert timing.tokens_per_second == pytest.approx(1e3 / timing.token.p50)
    assert timing.prompt.tokens_per_second == pytest.approx(64 / (2 * seconds))


def test_language_models_are_timed_reading_and_writing(clock):
    model = ZOO["llama"].model().eval()
    model.register_forward_pre_hook(lambda *_: clock.take(1e-4))

    class Texts(Rows):
        def batches(self, split, batch_size=None):
            yield torch.ones(batch_size or 2, 8, dtype=torch.long)

        def forward(self, model, batch):
            return model(input_ids=batch).logits

    subjects = [Subject("a", model, 40)] * 2
    scores = [Scores(METRICS["accuracy"], np.ones((4, 1)))] * 2
    first, _ = measure(subjects, scores, Texts(), limit=TimeLimit(0.5))
    assert [(each.work, each.batch_size) for each in first.latency] == [("prompt", 1), ("token", 1)]
    prompt, token = first.latency
    places = min(80, model.config.max_position_embeddings)
    assert prompt.tokens_per_second == pytest.approx(1e3 * (places * 64 // 80) / prompt.p50)
    assert token.tokens_per_second == pytest.approx(1e3 / token.p50)
    asked, _ = measure(subjects, scores, Texts(), batch_sizes=(1, 2), limit=TimeLimit(0.5))
    assert [each.batch_size for each in asked.latency] == [1, 1, 2, 2]
    assert not scorecard.writes(nn.Linear(2, 2))
    assert not scorecard.writes(ZOO["bert"].model())
    assert not scorecard.writes(ZOO["t5"].model())
