"""`lottery`: rounds of pruning and rewinding give back exactly the early weights, and the control does not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor import compress
from tersor.core.errors import DataError, InputError
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.tasks import open_task
from tersor.training import FinetuneStep, Job, LotteryStep
from tersor.training.finetune import task_loss
from tersor.training.journal import Journal
from tersor.training.loop import train
from tersor.training.masks import MaskChoice, Masks, sparsity_of

PLAIN = {"num_steps": 20, "batch_size": 32, "learning_rate": 0.1, "optimizer": "sgd", "num_evaluations": 0}
PLAIN |= {"momentum": 0.0, "weight_decay": 0.0}


@pytest.fixture
def task(tmp_path, one_thread):
    """Four classes around four random directions, with training data."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    y, y_train = rng.integers(0, 4, 200), rng.integers(0, 4, 704)
    x, x_train = (centres[labels] + 0.8 * rng.normal(size=(len(labels), 16)) for labels in (y, y_train))
    arrays = {"x_test": x, "x_train": x_train}
    np.savez(tmp_path / "data.npz", **{n: a.astype(np.float32) for n, a in arrays.items()}, y_test=y, y_train=y_train)
    return open_task("classification", tmp_path / "data.npz", options={"calibration_examples": 64})


def fresh(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).eval()


def run(step, task, model=None, journal=None):
    job = Job(model or fresh(), fresh(), task, journal=journal)
    step.run(job)
    return job


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def fit(model, task, step, **more):
    return train(model, task, task_loss(task), step, **more)


@pytest.mark.parametrize(
    ("rewind", "rewind_to", "reinit"),
    [("weights", 0.0, False), ("weights", 0.25, False), ("learning-rate", 0.25, False), ("weights", 0.25, True)],
)
def test_it_is_the_procedure_of_the_papers(task, rewind, rewind_to, reinit):
    """Two rounds written out by hand end in the same weights."""
    step = LotteryStep(sparsity=0.6, fraction=0.4, rewind=rewind, rewind_to=rewind_to, reinit=reinit, **PLAIN)
    job = run(step, task)

    model, masks, early = fresh(), Masks(), {}

    def remember(number, num_steps):
        if number == round(rewind_to * num_steps):
            early.update(copy.deepcopy(model.state_dict()))

    fit(model, task, step, on_step=remember)
    for number, sparsity in enumerate((0.4, 0.6), start=1):
        MaskChoice(sparsity).tighten(model, masks)
        start = rewind_to
        if reinit and number == 2:
            torch.manual_seed(1_000_003)
            for module in (model[0], model[1], model[3]):
                module.reset_parameters()
            start = 0.0
        elif rewind == "weights":
            model.load_state_dict(early)
        fit(model, task, step, masks=masks, start=start)
    assert same(job.model, model)
    lengths = [len(curve.losses) for curve in job.curves]
    assert lengths == [20, 20 - round(20 * rewind_to), 20 if reinit else 20 - round(20 * rewind_to)]


def test_rewinding_nothing_away_repeats_the_training(task):
    """A training that is left out until step k and begins with the weights of step k ends like the whole one."""
    step = FinetuneStep(**PLAIN)
    whole, part, early = fresh(), fresh(3), {}

    def remember(number, num_steps):
        if number == 5:
            early.update(copy.deepcopy(whole.state_dict()))

    curve = fit(whole, task, step, on_step=remember)
    part.load_state_dict(early)
    seen = []
    again = fit(part, task, step, start=0.25, on_step=lambda number, _: seen.append(number))
    assert same(whole, part)
    assert seen == list(range(5, 20))
    assert again.losses == curve.losses[5:]


@pytest.mark.parametrize(
    ("sparsity", "fraction", "expected"),
    [(0.9, 0.2, 11), (0.95, 0.2, 14), (0.36, 0.2, 2), (0.5, 0.5, 1), (0.75, 0.5, 2), (0.2, 0.9, 1)],
)
def test_rounds_drop_a_fraction_of_what_is_left_and_the_last_what_is_missing(task, sparsity, fraction, expected):
    step = LotteryStep(sparsity=sparsity, fraction=fraction, **PLAIN | {"num_steps": 1})
    assert step.num_rounds == expected
    job = run(step, task)
    assert len(job.curves) == expected + 1
    assert sparsity_of(job.masks) == pytest.approx(sparsity, abs=1e-3)
    zeros = sum(int((site.matrix(job.model) == 0).sum()) for site in find_sites(job.model))
    assert zeros == round(sparsity * (16 * 32 + 32 * 4))


def test_rules_and_scope(task):
    step = LotteryStep(sparsity=0.8, fraction=0.5, scope="site", rules={"3": 0.5}, **PLAIN)
    job = run(step, task)
    assert int((job.model[0].weight == 0).sum()) == round(0.8 * 16 * 32)
    assert int((job.model[3].weight == 0).sum()) == 64


def test_every_kept_weight_starts_where_it_started(task):
    """Trained for no length at all, the ticket is the initial network under its mask; the control is not."""
    tiny = PLAIN | {"learning_rate": 1e-30, "warmup": 0.0}
    first = fresh()
    for reinit in (False, True):
        job = run(LotteryStep(sparsity=0.5, fraction=0.3, reinit=reinit, **tiny), task)
        mask = job.masks.masks["0"]
        assert torch.equal(job.model[0].weight[mask], first[0].weight[mask]) is not reinit
        assert not job.model[0].weight[~mask].any()


def test_the_control_has_the_tickets_mask(task):
    ticket, control = (run(LotteryStep(sparsity=0.7, fraction=0.3, reinit=r, **PLAIN), task) for r in (False, True))
    assert all(torch.equal(ticket.masks.masks[name], mask) for name, mask in control.masks.masks.items())
    assert not same(ticket.model, control.model)


@pytest.mark.parametrize("kill_at", [3, 10, 25, 47, 60])
def test_a_killed_run_ends_in_the_weights_of_one_that_was_not(task, tmp_path, kill_at, monkeypatch):
    """Killed in the first training, before and after the weights that are rewound to, or in a later round."""
    step = LotteryStep(sparsity=0.7, fraction=0.4, rewind_to=0.25, **PLAIN)  # 20 + 3 * 15 steps
    straight = run(step, task)

    def dying(task):
        calls = iter(range(kill_at))

        def objective(model, batch):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return task_loss(task)(model, batch)

        return objective

    with monkeypatch.context() as patch:
        losses = dying(task)
        patch.setattr("tersor.training.lottery.task_loss", lambda task: losses)
        with pytest.raises(KeyboardInterrupt):
            run(step, task, journal=Journal(tmp_path / "step-0.safetensors", "key", seconds=0))
    again = run(step, task, fresh(), Journal(tmp_path / "step-0.safetensors", "key", seconds=0))
    assert same(straight.model, again.model)
    assert [curve.losses for curve in again.curves] == [curve.losses for curve in straight.curves]
    assert len(list(tmp_path.glob("step-0-*.safetensors"))) == 1 + len(again.curves)


def test_as_a_recipe_the_ticket_is_stored_sparse(task):
    text = """
    steps:
    - {step: lottery, sparsity: 0.8, fraction: 0.5, num_steps: 20, learning_rate: 0.01, num_evaluations: 0}
    - {step: finetune, num_steps: 5}
    - {step: weights, scheme: 'zero-mask:bitmask'}
    """
    model = fresh()
    made = compress(model, Recipe.from_yaml(text), task)
    assert sum(site.num_bytes for site in made.sites) == (16 * 32 + 32 * 4) * (1 / 8 + 0.2 * 2)
    assert same(model, fresh()), "the original is left as it was"
    names = [curve.name for curve in made.curves]
    assert names == [*(f"lottery, round {number} of 3" for number in range(4)), "finetune"]


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.scale * x)


def test_what_cannot_be_is_said_before_anything_is_trained(task, monkeypatch):
    monkeypatch.setattr("tersor.training.lottery.train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=r"reset_parameters\(\), and the model \(Bare\) has parameters but no"):
        run(LotteryStep(reinit=True, **PLAIN), task, Bare())
    with pytest.raises(DataError, match="lottery: no task has no train split"):
        run(LotteryStep(), None)
    with pytest.raises(InputError, match=r"steps\.0\.fraction: Input should be less than 1"):
        Recipe.from_yaml("steps: [{step: lottery, fraction: 1}]")
    with pytest.raises(InputError, match=r"steps\.0\.rewind: Input should be 'weights' or 'learning-rate'"):
        Recipe.from_yaml("steps: [{step: lottery, rewind: lr}]")
    with pytest.raises(InputError, match=r"rules\.fc: -1\.0 is not a fraction"):
        Recipe.from_yaml("steps: [{step: lottery, rules: {fc: -1}}]")
