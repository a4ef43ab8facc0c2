"""`prune`: the cubic schedule to the exact sparsity, recovery, and masks that every later step honours."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor import compress
from tersor.core.errors import DataError, FormatError, InputError, UnknownName
from tersor.measure.verdict import Tolerance, judge
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.tasks import open_task
from tersor.training import Job, PruneStep
from tersor.training.finetune import task_loss
from tersor.training.imitation import imitation
from tersor.training.journal import Journal
from tersor.training.loop import train
from tersor.training.prune import cubic

NUM_WEIGHTS = 16 * 64 + 64 * 4


@pytest.fixture
def task(tmp_path):
    """Four classes around four random directions, with training data."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    y, y_train = rng.integers(0, 4, 400), rng.integers(0, 4, 1088)
    x, x_train = (centres[labels] + 0.8 * rng.normal(size=(len(labels), 16)) for labels in (y, y_train))
    arrays = {"x_test": x, "x_train": x_train}
    np.savez(tmp_path / "data.npz", **{n: a.astype(np.float32) for n, a in arrays.items()}, y_test=y, y_train=y_train)
    return open_task("classification", tmp_path / "data.npz", options={"calibration_examples": 64})


@pytest.fixture
def model(task, one_thread):
    """Trained, so that there is something to lose."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    train(net, task, task_loss(task), PruneStep(epochs=3, learning_rate=0.01, num_evaluations=0))
    return net


def prune(model, task, **fields):
    """The pruned copy of a model, and the job."""
    step = PruneStep(**{"epochs": 3, "learning_rate": 0.01, "num_evaluations": 0} | fields)
    job = Job(tersor.compress(model, Recipe.of()).model, model, task)
    step.run(job)
    return job.model, job


def dying(objective, num_calls):
    """An objective that ends the run after so many calls."""
    calls = iter(range(num_calls))

    def or_die(model, batch):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return objective(model, batch)

    return or_die


def num_zeros(model):
    return sum(int((site.matrix(model) == 0).sum()) for site in find_sites(model))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The schedule.


def test_cubic_is_the_formula_of_the_paper():
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 at every t of a ramp of n = 10 prunings."""
    for t in range(11):
        assert cubic(t / 10, 0.2, 0.9) == pytest.approx(0.9 + (0.2 - 0.9) * (1 - t / 10) ** 3, abs=1e-12)
    assert cubic(0.0, 0.5, 0.3) == 0.3, "a rule below initial_sparsity starts at its end"


@pytest.mark.parametrize("ramp", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("num_steps", [1, 3, 40, 97])
@pytest.mark.parametrize("num_prunings", [1, 4, 20])
def test_shares_rise_evenly_and_end_with_the_ramp(ramp, num_steps, num_prunings):
    step = PruneStep(ramp=ramp, num_prunings=num_prunings)
    shares = [step.share(number, num_steps) for number in range(num_steps)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(share == 1.0 for share in shares[int(ramp * num_steps) :])
    assert all(share * num_prunings == round(share * num_prunings) for share in shares)
    ramp_steps = int(ramp * num_steps)
    for number, share in enumerate(shares[:ramp_steps]):
        assert share <= number / ramp_steps < share + 1 / num_prunings
    if ramp_steps >= num_prunings:
        assert len(set(shares)) == num_prunings + 1


def test_the_sparsity_follows_the_schedule_while_it_trains(task, model, monkeypatch):
    """At every step, the number of zeros is the cubic's, and none that was there is gone."""
    seen = []

    def spy(trained, task, objective, settings, *, on_step, **rest):
        def and_look(step, num_steps):
            on_step(step, num_steps)
            seen.append(torch.cat([site.matrix(trained).flatten() == 0 for site in find_sites(trained)]))

        return train(trained, task, objective, settings, on_step=and_look, **rest)

    monkeypatch.setattr("tersor.training.prune.train", spy)
    prune(model, task, num_steps=40, sparsity=0.8, initial_sparsity=0.1, ramp=0.5, num_prunings=5)
    wanted = [cubic(min(1.0, step // 4 / 5), 0.1, 0.8) for step in range(40)]
    assert [int(zeros.sum()) for zeros in seen] == [round(sparsity * NUM_WEIGHTS) for sparsity in wanted]
    assert all(not (before & ~after).any() for before, after in pairwise(seen))


# What comes out.


@pytest.mark.parametrize("scope", ["global", "site"])
@pytest.mark.parametrize("sparsity", [0.5, 0.83])
def test_exactly_as_sparse_as_asked_for(task, model, scope, sparsity):
    pruned, job = prune(model, task, sparsity=sparsity, scope=scope)
    assert num_zeros(pruned) == round(sparsity * NUM_WEIGHTS)
    for site in find_sites(pruned):
        zeros = site.matrix(pruned) == 0
        assert torch.equal(zeros, ~job.masks.masks[site.name])
        if scope == "site":
            assert int(zeros.sum()) == round(sparsity * zeros.numel())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns(task, model, pattern):
    pruned, _ = prune(model, task, pattern=pattern)
    size = int(pattern[-1])
    for site in find_sites(pruned):
        assert ((site.matrix(pruned) != 0).unflatten(1, (-1, size)).sum(-1) == size // 2).all()
    stored = compress(pruned, Recipe.of(f"zero-mask:{pattern}"))
    assert stored.sites[0].bits_per_weight == 9.0
    assert num_zeros(stored.model) == NUM_WEIGHTS // 2


def test_exclude_and_rules(task, model):
    pruned, _ = prune(model, task, sparsity=0.6, exclude=("2",))
    assert (pruned[2].weight != 0).all()
    assert int((pruned[0].weight == 0).sum()) == round(0.6 * 16 * 64)
    pruned, _ = prune(model, task, sparsity=0.6, rules={"2": 0.25})
    assert int((pruned[2].weight == 0).sum()) == 64
    assert int((pruned[0].weight == 0).sum()) == round(0.6 * 16 * 64)


def test_training_wins_back_what_pruning_alone_loses(task, model):
    """At 90 %: pruned and trained stays within two points, pruned alone does not."""
    original = task.score(model)
    alone = compress(model, Recipe.of("magnitude(sparsity=0.9):bitmask")).model
    trained, _ = prune(model, task, sparsity=0.9)
    gradual = task.score(trained)
    assert task.score(alone).value < original.value - 0.05
    assert judge(original, gradual, Tolerance(0.05, False)).outcome == "within"


def test_the_original_is_never_changed_and_teaches(task, model):
    """Without labels (alpha 0) the pruned model comes nearer to the original than by its labels."""
    before = state_of(model)
    apart = {}
    for alpha in (0.0, 1.0):
        pruned, _ = prune(model, task, sparsity=0.85, alpha=alpha, epochs=4)
        loss = imitation(task, model)
        with torch.no_grad():
            apart[alpha] = np.mean([loss(pruned, batch).item() for batch in task.batches("eval")])
    assert apart[0.0] < apart[1.0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# With other steps.


def test_later_steps_hold_the_mask(task, model):
    """finetune moves no pruned weight, kept stores the mask, and a second prune step counts the first."""
    fast = {"epochs": 1, "num_evaluations": 0, "learning_rate": 0.01}
    steps = [
        {"step": "prune", "sparsity": 0.5, **fast},
        {"step": "finetune", **fast},
        {"step": "prune", "sparsity": 0.75, **fast},
        {"step": "weights", "scheme": "zero-mask:bitmask+int8"},
    ]
    made = compress(model, Recipe.model_validate({"steps": steps}), task)
    assert sum(int((site.matrix(made.model) == 0).sum()) for site in find_sites(made.model)) >= 0.75 * NUM_WEIGHTS
    stored = sum(site.num_bytes for site in made.sites)
    assert stored == NUM_WEIGHTS // 8 + NUM_WEIGHTS // 4 + 2 * (64 + 4)  # mask, a code for every kept weight, scales
    assert [curve.name for curve in made.curves] == ["prune", "finetune", "prune"]


def test_a_method_that_fills_zeros_is_refused_with_the_way_out(task, model):
    steps = [{"step": "prune", "num_steps": 4}, {"step": "weights", "scheme": "int4-asym"}]
    with pytest.raises(FormatError, match=r"fills weights that an earlier step pruned; .*zero-mask"):
        compress(model, Recipe.model_validate({"steps": steps}), task)


@pytest.mark.parametrize("kill_at", [1, 9, 25])
def test_a_killed_run_ends_in_the_weights_of_one_that_was_not(task, model, tmp_path, kill_at, monkeypatch):
    fields = {"num_steps": 30, "sparsity": 0.7, "ramp": 0.6, "num_prunings": 6}
    straight, _ = prune(model, task, **fields)
    step = PruneStep(**{"learning_rate": 0.01, "num_evaluations": 0} | fields)

    def run(journal):
        job = Job(tersor.compress(model, Recipe.of()).model, model, task, journal=journal)
        step.run(job)
        return job

    with monkeypatch.context() as patch:
        patch.setattr("tersor.training.prune.imitation", lambda task, *_: dying(task_loss(task), kill_at))
        with pytest.raises(KeyboardInterrupt):
            run(Journal(tmp_path / "j", "key", seconds=0))
    resumed = run(Journal(tmp_path / "j", "key", seconds=0))
    assert all(torch.equal(tensor, straight.state_dict()[n]) for n, tensor in resumed.model.state_dict().items())


def test_training_is_not_lost_when_a_later_step_fails(task, model, tmp_path, monkeypatch):
    """With another format the checkpoint is taken up; what can be known beforehand is refused before it."""
    prune = {"step": "prune", "sparsity": 0.4, "num_steps": 20, "learning_rate": 0.01}

    def made(scheme, **more):
        recipe = Recipe.model_validate({"steps": [prune | more, {"scheme": scheme}]})
        return compress(model, recipe, task, journal=tmp_path / "journal").model

    with pytest.raises(FormatError, match="keeps more than 2 of 4 columns; use bitmask"):
        made("zero-mask:2:4")
    assert not (tmp_path / "journal").exists()
    with monkeypatch.context() as patch:
        patch.setattr("tersor.pipeline.check_masks", lambda *_: (_ for _ in ()).throw(FormatError("later")))
        with pytest.raises(FormatError, match="later"):
            made("mse:int8")
    with monkeypatch.context() as patch:
        patch.setattr("tersor.training.prune.imitation", lambda *_: lambda *_: pytest.fail("trained again"))
        assert num_zeros(made("zero-mask:bitmask")) == round(0.4 * NUM_WEIGHTS)
    assert num_zeros(made("zero-mask:bitmask", sparsity=0.5)) == NUM_WEIGHTS // 2, "another step, trained anew"


def test_through_the_command_line_path_into_an_artifact(task, model, tmp_path, monkeypatch):
    """prune, then int8 of what is left, written, loaded back, judged; the masks survive the file."""
    from safetensors.torch import save_file

    (tmp_path / "pruned_toy.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))\n"
    )
    save_file(model.state_dict(), tmp_path / "toy.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Recipe.from_yaml(
        "steps: [{step: prune, sparsity: 0.7, epochs: 2, learning_rate: 0.01}, {scheme: 'zero-mask:bitmask+int8'}]"
    )
    outcome = tersor.compress(
        "pruned_toy:make",
        recipe,
        "classification",
        data=tmp_path / "data.npz",
        output=tmp_path / "small",
        weights=tmp_path / "toy.safetensors",
        batch_sizes=1,
    )
    loaded = tersor.load(tmp_path / "small", model=model)
    assert num_zeros(loaded) >= round(0.7 * NUM_WEIGHTS)
    assert outcome.manifest["training"][0]["name"] == "prune"
    assert outcome.verdict.drop < 0.05


# Bad input.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("sparsity: 1.0", r"steps\.0\.sparsity: Input should be less than 1"),
        ("sparsity: 0", r"steps\.0\.sparsity: Input should be greater than 0"),
        ("ramp: 1.0", r"steps\.0\.ramp: Input should be less than 1"),
        ("alpha: 1.5", r"steps\.0\.alpha: Input should be less than or equal to 1"),
        ("temperature: 0", r"steps\.0\.temperature: Input should be greater than 0"),
        ("pattern: '3:4'", r"steps\.0\.pattern: Input should be 'unstructured', '2:4' or '4:8'"),
        ("scope: layer", r"steps\.0\.scope: Input should be 'global' or 'site'"),
        ("initial_sparsity: 0.6", "initial_sparsity 0.6 is above sparsity 0.5; lower it"),
        ("rules: {fc: 1.5}", r"rules\.fc: 1\.5 is not a fraction; give one in \[0, 1\)"),
        ("pattern: '2:4', sparsity: 0.7", r"sparsity 0\.7: pattern 2:4 drops half .*leave sparsity and rules out"),
        ("pattern: '2:4', rules: {fc: 0.2}", r"rules .*fc.*: pattern 2:4 drops half"),
        ("patience: 2", r"patience 2 would take weights back from before they were pruned; .*ramp: 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_yaml(f"steps: [{{step: prune, {fields}}}]")


def test_a_pattern_without_a_site_is_said_before_anything_is_measured(tmp_path, task, model, monkeypatch):
    recipe = Recipe.from_yaml("steps: [{step: finetune}, {step: prune, exclude: [fc9]}]")
    monkeypatch.setattr("tersor.tasks.data.Data.open", lambda *_: pytest.fail("opened the task"))
    with pytest.raises(UnknownName, match="site pattern 'fc9'"):
        tersor.compress(model, recipe, "classification", data="nowhere.npz")
    with pytest.raises(DataError, match="prune: no task has no train split"):
        PruneStep().run(Job(model, model, None))
