"""tune-scales: what is continuous in packed weights is trained, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from laws import check_layout, random, widened
from tersor.checkpoint.artifact import load, save
from tersor.core.errors import DataError, InputError
from tersor.formats import FORMATS, format_named
from tersor.formats.codebook import Codebook
from tersor.formats.coded import FINER
from tersor.formats.contract import Encoded
from tersor.methods import Kmeans
from tersor.methods.stats import Stats
from tersor.nn.packed import Fold, PackedWeight
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.schemes.scheme import Scheme
from tersor.tasks import open_task
from tersor.tasks.fidelity import kl_divergence
from tersor.tasks.inputs import scoring
from tersor.training import Job, TuneScalesStep
from tersor.training.journal import Journal
from tersor.training.norms import Norms
from tersor.training.tune_scales import RemainderTensors, in_training, parts_of, prepared_parts

TUNED = [name for name, format in FORMATS.items() if format.trainable_parts]
pytestmark = pytest.mark.usefixtures("one_thread")


def packed_in(name):
    """A weight in a format, by its usual method."""
    weight = widened(random(16, 256, seed=5), format_named(name))
    return Scheme.parse(name).method.compress(weight, format_named(name), Stats())


def leftovers_of(encoded):
    packed = PackedWeight(encoded, Fold(encoded.shape), torch.float32)
    return packed, RemainderTensors(prepared_parts(packed))


@pytest.mark.parametrize("name", TUNED)
def test_decoding_is_differentiable_in_every_continuous_part(name):
    """Against the slope between two decoded weights."""
    encoded = packed_in(name)
    floats = {part: encoded.parts[part].float() for part in encoded.format.trainable_parts}
    assert floats
    pull = random(*encoded.shape, seed=6)

    def decoded(values):
        return (Encoded(encoded.format, encoded.shape, {**encoded.parts, **values}).decode() * pull).sum()

    for part, value in floats.items():
        trained = value.clone().requires_grad_()
        (slope,) = torch.autograd.grad(decoded({part: trained}), trained)
        way = value.abs() * torch.sign(slope)  # towards a larger sum: nothing cancels
        for_double = (decoded({part: value + 0.01 * way}) - decoded({part: value - 0.01 * way})) / 0.02
        torch.testing.assert_close((slope * way).sum(), for_double, rtol=1e-2, atol=1e-4)
        assert slope.any()


@pytest.mark.parametrize("name", TUNED)
def test_what_is_stored_is_what_was_trained(name):
    """Untouched, the parts keep their bytes; moved, they are laid out as the format says and decode as in training."""
    encoded = packed_in(name)
    packed, leftovers = leftovers_of(encoded)
    before = {part: tensor.clone() for part, tensor in packed.tensors.items()}
    assert torch.equal(packed(), encoded.decode())
    leftovers.write_back()
    assert all(torch.equal(packed.tensors[part].float(), tensor.float()) for part, tensor in before.items())
    with torch.no_grad():
        for number, shift in enumerate(leftovers.shifts):
            shift.add_(0.05 * random(*shift.shape, seed=number))
    leftovers.install()
    trained = packed().detach()
    leftovers.write_back()
    assert not any(tensor.requires_grad for tensor in packed.tensors.values())
    check_layout(packed.encoded)
    assert torch.equal(packed(), trained)
    assert not torch.equal(trained, Encoded(encoded.format, encoded.shape, before).decode())
    if isinstance(encoded.format, Codebook):
        assert (packed.tensors["codebook"].diff(dim=-1) >= 0).all()


def test_zero_in_a_codebook_stays_and_nothing_crosses_it():
    """What shares it was pruned."""
    weight = random(4, 64)
    encoded = Kmeans().compress(torch.where(weight.abs() > 1, weight, 0.0), Codebook(8), Stats())
    before = encoded.decode()
    packed, leftovers = leftovers_of(encoded)
    with torch.no_grad():
        leftovers.shifts[0].add_(3 * random(*leftovers.shifts[0].shape))
    leftovers.write_back()
    assert (packed()[before == 0] == 0).all()
    assert (packed() * before >= 0).all()
    assert not torch.equal(packed(), before)


def test_every_format_has_something_to_train_but_powers_of_two_and_the_weights_themselves():
    """MXFP4's scales are powers of two; what the others hold are the weights themselves."""
    assert FORMATS.keys() - TUNED == {"fp16", "bf16", "mxfp4", "bitmask", "2:4", "4:8"}


# Training.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.deep(self.norm(self.conv(x)).relu().amax((2, 3))).relu())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of small images, by where the bright stripe is."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)

    def draw(num):
        y = rng.integers(0, 3, num)
        x = rng.normal(size=(num, 2, 6, 6)).astype(np.float32)
        x[np.arange(num), 0, 2 * y] += 1.0
        return x, y

    (x, y), (x_train, y_train) = draw(256), draw(512)
    np.savez(folder / "data.npz", x_test=x, y_test=y, x_train=x_train, y_train=y_train)
    return open_task("classification", folder / "data.npz", options={"calibration_examples": 64})


@pytest.fixture(scope="module")
def net(images):
    """Trained in float; nobody may change it."""
    torch.manual_seed(0)
    return tersor.compress(Net(), recipe({"step": "finetune", "epochs": 4, "learning_rate": 0.02}), images).model.eval()


def recipe(*steps):
    return Recipe.validated({"steps": list(steps)}, "the test")


def tuned(scheme, **fields):
    fields = {"num_steps": 80, "batch_size": 16, "learning_rate": 0.02, "num_evaluations": 0, **fields}
    return recipe({"step": "weights", "scheme": scheme}, {"step": "tune-scales", **fields})


def divergence(model, original, task):
    """Mean KL from the original on the eval split."""
    total = count = 0
    with scoring(model), scoring(original):
        for batch in task.batches("eval"):
            outputs = [task.forward(each, batch) for each in (original, model)]
            total, count = total + kl_divergence(*outputs), count + len(outputs[0])
    return total / count


@pytest.mark.parametrize("scheme", ["nearest:int3", "nearest:int2-g32-asym/int8-static", "codebook4"])
def test_the_model_comes_closer_to_the_original(scheme, images, net, tmp_path):
    packed = tersor.compress(net, Recipe.of(scheme), images).model
    made = tersor.compress(net, tuned(scheme), images)
    assert divergence(made.model, net, images) < 0.9 * divergence(packed, net, images)
    assert made.curves[0].name == "tune-scales"
    for site in find_sites(net):
        ours, theirs = (model.get_submodule(site.name).packed.tensors for model in (made.model, packed))
        assert torch.equal(ours["codes"], theirs["codes"])
        assert all(ours[part].dtype == theirs[part].dtype for part in theirs)
    save(made.model, tmp_path / "out")
    save(packed, tmp_path / "packed")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "packed")]
    assert sizes[0] == sizes[1]
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", model=Net())(x), made.model.eval()(x))


def test_scales_of_codes_take_fine_steps(images, net, tmp_path):
    """Exponents are trained in steps that are fine enough, and cost no more than a few bits for each row and column."""
    scheme = "waterfill(level=0.02):coded"
    packed = tersor.compress(net, Recipe.of(scheme), images).model
    made = tersor.compress(net, tuned(scheme), images)
    assert divergence(made.model, net, images) < 0.9 * divergence(packed, net, images)
    for site in find_sites(net):
        ours, theirs = (model.get_submodule(site.name).packed.tensors for model in (made.model, packed))
        assert torch.equal(ours["codes"], theirs["codes"])
        assert {part: tensor.dtype for part, tensor in ours.items()} == {p: t.dtype for p, t in theirs.items()}
        assert (ours["row"] % FINER != 0).any(), "a step no finer than before"
    save(made.model, tmp_path / "out")
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", model=Net())(x), made.model.eval()(x))


def test_what_is_trained_and_what_is_not(images, net):
    """Scales, biases and the norm's gain and offset; not the weights that were kept, nor the norm's statistics."""
    steps = tuned("int4", num_steps=3).model_dump()["steps"]
    steps[0]["exclude"] = ["head"]
    packed = tersor.compress(net, recipe(steps[0]), images).model
    made = tersor.compress(net, recipe(*steps), images).model
    before, after = packed.state_dict(), made.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"conv.packed.scale", "deep.packed.scale", "deep.bias", "head.bias", "norm.weight", "norm.bias"}
    assert made.head.weight.requires_grad
    assert not made._forward_pre_hooks


def test_gradients_reach_the_first_layer_through_quantized_inputs(images, net):
    model = tersor.compress(net, Recipe.of("int8/int4-static"), images).model
    leftovers = RemainderTensors(parts_of(model))
    with in_training(model, leftovers):
        model(torch.randn(4, 2, 6, 6)).square().sum().backward()
        assert len(leftovers.shifts) == 3
        assert all(shift.grad is not None and shift.grad.any() for shift in leftovers.shifts)


def test_tied_weights_are_trained_once(images):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 32), nn.Linear(32, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, index):
            return self.head(self.embed(index))

    model = tersor.compress(Tied(), Recipe.of("int4-g32")).model
    leftovers = RemainderTensors(parts_of(model))
    assert len(leftovers.shifts) == 1
    with in_training(model, leftovers):
        model(torch.tensor([[1, 2]])).square().sum().backward()
        assert leftovers.shifts[0].grad.all(), "the head reaches every row"
    assert model.embed.packed is model.head.packed


def test_a_killed_run_ends_like_one_that_was_not(images, net, tmp_path, monkeypatch):
    packed = tersor.compress(net, Recipe.of("int3"), images).model
    step = TuneScalesStep(num_steps=10, batch_size=16, learning_rate=0.01)

    def run(journal=None):
        job = Job(copy.deepcopy(packed), net, images, journal=journal)
        step.run(job)
        return job.model.state_dict()

    straight, watched = run(), Norms.watched

    def dying(self, objective):
        calls = iter(range(6))
        inner = watched(self, objective)

        def objective(model, batch):
            if next(calls) == 5:
                raise KeyboardInterrupt
            return inner(model, batch)

        return objective

    monkeypatch.setattr(Norms, "watched", dying)
    with pytest.raises(KeyboardInterrupt):
        run(Journal(tmp_path / "journal", "key", seconds=0))
    monkeypatch.setattr(Norms, "watched", watched)
    resumed = run(Journal(tmp_path / "journal", "key", seconds=0))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_what_is_refused(images, net):
    with pytest.raises(InputError, match=r"no site is packed in a format with scales.*weights step"):
        tersor.compress(net, recipe({"step": "tune-scales"}), images)
    with pytest.raises(InputError, match="no site is packed"):
        tersor.compress(net, tuned("bf16"), images)
    with pytest.raises(DataError, match="no train split"):
        tersor.compress(net, tuned("int4"), None)
    with pytest.raises(InputError, match="alpha"):
        tuned("int4", alpha=-1)
