"""The training loop: it learns, stops when it should, and goes on where it was killed."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.errors import DataError, InputError
from tersor.tasks import open_task
from tersor.training import FinetuneStep, Job, Masks
from tersor.training.finetune import task_loss
from tersor.training.journal import Journal
from tersor.training.loop import train


@pytest.fixture
def task(tmp_path):
    """Two classes that a line parts, with training data."""
    rng = np.random.default_rng(0)
    x, x_train = rng.normal(size=(100, 8)).astype(np.float32), rng.normal(size=(320, 8)).astype(np.float32)
    y, y_train = (array @ np.arange(-3.5, 4) > 0 for array in (x, x_train))
    np.savez(tmp_path / "data.npz", x_test=x, y_test=y.astype(int), x_train=x_train, y_train=y_train.astype(int))
    return open_task("classification", tmp_path / "data.npz", options={"calibration_examples": 64})


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


STEP = FinetuneStep(epochs=3, batch_size=16, learning_rate=0.02)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(model, task, step=STEP, **more):
    return train(model, task, task_loss(task), step, **more)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_says_so(task):
    model = small_model()
    before = task.score(model).value
    curve = run(model, task)
    assert task.score(model).value > max(before, 0.9)
    assert len(curve.losses) == curve.num_steps == 48  # 3 epochs of 256 rows by 16
    assert [step for step, _ in curve.scores] == [10, 20, 29, 39, 48]
    assert curve.metric == "accuracy"
    assert np.mean(curve.losses[-5:]) < np.mean(curve.losses[:5])


def test_training_leaves_modes_and_the_callers_random_numbers_alone(task):
    model = small_model().eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(model, task)
    assert torch.equal(torch.rand(3), expected)
    assert not any(module.training for module in model.modules())


def test_the_same_seed_gives_the_same_weights_and_another_does_not(task):
    states = []
    for seed in (0, 0, 1):
        model = small_model()
        run(model, task, seed=seed)
        states.append(state_of(model))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kill_at", [1, 13, 23])
def test_a_killed_run_ends_in_the_weights_of_one_that_was_not(task, tmp_path, kill_at, accumulate):
    step = FinetuneStep(num_steps=24, batch_size=8, accumulate=accumulate, learning_rate=0.02, patience=3)
    straight = small_model()
    curve = run(straight, task, step, seed=3)

    def die(done, num_steps):
        if done == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small_model(), task, step, seed=3, on_step=die, journal=Journal(tmp_path / "j", "key", seconds=0))
    resumed = small_model(seed=9)  # the journal's weights count, not those it is given
    seen = []
    again = run(
        resumed,
        task,
        step,
        seed=3,
        on_step=lambda done, _: seen.append(done),
        journal=Journal(tmp_path / "j", "key", seconds=0),
    )
    assert seen[0] == kill_at
    assert same(state_of(straight), state_of(resumed))
    assert again.losses == curve.losses
    assert again.scores == curve.scores


def test_a_finished_run_is_not_run_again_and_another_runs_journal_is_not_taken(task, tmp_path):
    first = small_model()
    run(first, task, journal=Journal(tmp_path / "j", "key"))
    second = small_model(seed=5)
    run(second, task, on_step=lambda *_: pytest.fail("trained again"), journal=Journal(tmp_path / "j", "key"))
    assert same(state_of(first), state_of(second))
    third, fourth = small_model(seed=5), small_model(seed=5)
    run(third, task, journal=Journal(tmp_path / "j", "another"))
    run(fourth, task)
    assert same(state_of(third), state_of(fourth))
    (tmp_path / "j").write_bytes(b"\0" * 99)
    fifth = small_model(seed=5)
    run(fifth, task, journal=Journal(tmp_path / "j", "another"))
    assert same(state_of(fifth), state_of(fourth))


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_weights(task):
    model, calls = small_model(), 0

    def objective(model, batch):
        nonlocal calls
        calls += 1
        loss = task_loss(task)(model, batch)
        return loss * float("nan") if calls > 30 else loss

    curve = train(model, task, objective, STEP)
    assert len(curve.losses) == 30
    assert "kept the weights of step 30" in curve.notes[0] or "kept the weights of step 2" in curve.notes[0]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert task.score(model).value > 0.8
    with pytest.raises(DataError, match=r"first loss is NaN.*learning_rate"):
        train(small_model(), task, lambda model, batch: model(batch.inputs["x"]).sum() * float("nan"), STEP)


def test_patience_takes_the_best_weights_back(task):
    model = small_model()
    kept = {}

    def on_step(done, num_steps):
        kept[done] = state_of(model)
        if done >= 30:  # what comes now can only make it worse
            with torch.no_grad():
                model[3].weight.mul_(-1.0)

    step = FinetuneStep(epochs=6, batch_size=16, learning_rate=0.02, num_evaluations=16, patience=2)
    curve = run(model, task, step, on_step=on_step)
    assert "stopped" in curve.notes[0]
    best = max(curve.scores, key=lambda pair: pair[1])
    assert task.score(model, "calibration").value == best[1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masked_weights_stay_zero_under_every_optimizer(task, optimizer):
    model = small_model()
    masks = Masks({"0": torch.rand(16, 8) < 0.5, "3": torch.rand(2, 16) < 0.5})
    step = FinetuneStep(epochs=2, optimizer=optimizer, learning_rate=0.02, weight_decay=0.1)
    before = model[0].weight.detach().clone()
    run(model, task, step, masks=masks)
    for site, mask in masks.masks.items():
        assert not model.get_submodule(site).weight[~mask].any()
    kept = masks.masks["0"]
    assert (model[0].weight[kept] != before[kept]).all()


def test_accumulating_equals_one_large_batch(task):
    """Without dropout, two batches of 8 give the step of one of 16."""
    states = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        model = small_model()
        model[2].p = 0.0
        step = FinetuneStep(
            num_steps=5, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", momentum=0.0, learning_rate=0.1
        )
        run(model, task, step)
        states.append(state_of(model))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor)


def test_bf16_learns_too(task):
    model = small_model()
    run(model, task, FinetuneStep(epochs=3, batch_size=16, learning_rate=0.02, precision="bf16"))
    assert model[0].weight.dtype is torch.float32
    assert task.score(model).value > 0.9


def test_what_cannot_be_trained_is_said_before_anything_is_done(task, tmp_path):
    np.savez(tmp_path / "no-train.npz", x=np.zeros((20, 8)), y=np.arange(20) % 2)
    without = open_task("classification", tmp_path / "no-train.npz")
    with pytest.raises(DataError, match="--train FILE"):
        run(small_model(), without)
    with pytest.raises(DataError, match="no task has no train split"):
        FinetuneStep().run(Job(small_model(), small_model(), None))
    with pytest.raises(InputError, match="nothing to train"):
        run(small_model().requires_grad_(False), task)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="adamw-8bit runs on a GPU"):
            run(small_model(), task, FinetuneStep(optimizer="adamw-8bit"))
    with pytest.raises(InputError, match="gradient_checkpointing is for"):
        run(small_model(), task, FinetuneStep(gradient_checkpointing=True))
