"""Quantization-aware training: what is packed gives the numbers of training, and its gradients are LSQ's."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

import tersor
from tersor.activations.quantizers import ACTIVATIONS, Activation, IntStatic
from tersor.checkpoint.artifact import load, save
from tersor.checkpoint.layout import packed_sites
from tersor.core.errors import DataError, FormatError, InputError, UnknownName
from tersor.formats import FORMATS, format_named
from tersor.formats.fp8 import Fp8
from tersor.formats.int_group import IntGroup
from tersor.formats.overflow import keeps_pair_rule
from tersor.kernels import reference
from tersor.methods.stats import Stats
from tersor.nn.packed import Fold, PackedConv
from tersor.nn.sites import find_sites
from tersor.recipe import Recipe
from tersor.schemes.assignment import Assignment
from tersor.tasks import open_task
from tersor.tasks.fidelity import kl_divergence
from tersor.tasks.inputs import scoring
from tersor.tasks.scores import Scores
from tersor.training import Job, Masks, QatStep
from tersor.training.fake_quant import FakeInput, FakeWeight
from tersor.training.journal import Journal
from tersor.training.norms import Norms
from tersor.training.qat import Fakes, PlannedSite, groups
from zoo import ZOO, outputs

LEARNED = [name for name, format in FORMATS.items() if isinstance(format, IntGroup | Fp8)]
TRIED = [name for name in LEARNED if "g128" not in name and "g64" not in name]
STATIC = [name for name, activation in ACTIVATIONS.items() if activation.layout]


class Net(nn.Module):
    """Convolutions with batch norms, one of them strided and in groups, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Conv2d(8, 8, 3, stride=2, groups=2, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.deep(x).relu().mean((2, 3)))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of small images, by where the bright stripe is."""
    tmp_path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)

    def draw(num):
        y = rng.integers(0, 3, num)
        x = rng.normal(size=(num, 2, 6, 6)).astype(np.float32)
        x[np.arange(num), 0, 2 * y] += 1.0
        return x, y

    (x, y), (x_train, y_train) = draw(256), draw(512)
    np.savez(tmp_path / "data.npz", x_test=x, y_test=y, x_train=x_train, y_train=y_train)
    return open_task("classification", tmp_path / "data.npz", options={"calibration_examples": 64})


@pytest.fixture(scope="module")
def net(images):
    """Trained in float; nobody may change it."""
    torch.manual_seed(0)
    made = tersor.compress(Net(), recipe("finetune", epochs=6, batch_size=32, learning_rate=0.02), images)
    return made.model.eval()


def recipe(step, **fields):
    return Recipe.validated({"steps": [{"step": step, **fields}]}, "the test")


def qat(**fields):
    return recipe("qat", **{"epochs": 2, "batch_size": 32, "learning_rate": 0.005, **fields})


def shaken(fakes, seed=3):
    """Scales, zero points and weights as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for fake in [*fakes.weights.values(), *fakes.inputs.values()]:
            for parameter in fake.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def faked(model, scheme, sample=None):
    """Fake quantizers in a model, away from where they began."""
    work = dict(Assignment(step="qat", scheme=scheme).assign(find_sites(model)))
    begun = {}
    for site, chosen in work.items():
        encoded, activation = chosen.method.compress(site.matrix(model), chosen.format, Stats()), None
        if chosen.activation and site.takes_activation(model, chosen.activation):
            activation = Activation(chosen.activation, ACTIVATIONS[chosen.activation].fit(Stats(sample=sample)))
        begun[site.name] = PlannedSite(encoded, activation)
    fakes = Fakes.put(model, work, begun)
    shaken(fakes)
    return fakes


# What is packed is what was trained.


def every(number, values):
    """The values, all but every `number`-th only in the slow run."""
    return [
        pytest.param(*value, marks=() if index % number == 0 else pytest.mark.slow)
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(("format", "activation"), every(5, product(TRIED, [None, *ACTIVATIONS])))
def test_the_packed_model_gives_the_numbers_of_training(format, activation):
    """Every integer and FP8 format with every activation; the integer kernels within float rounding."""
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(4, 2, 6, 6)
    scheme = f"nearest:{format}" + (f"/{activation}" if activation else "")
    fakes = faked(model, scheme, x.flatten(1))
    trained = model(x)
    reports = fakes.pack(model)
    assert {report.activation for report in reports.values()} <= {activation, None}
    assert reports["head"].activation == activation
    assert (reports["deep"].activation == activation) == (activation is None or activation in STATIC)
    with torch.no_grad():
        with reference():
            assert torch.equal(model(x), trained)
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["int4-g32-asym", "fp8-e4m3"])
@pytest.mark.parametrize("name", ZOO)
def test_so_does_every_kind_of_site(name, format):
    """RNNs, attention, experts, tied weights, Hugging Face's models."""
    case = ZOO[name]
    model = case.model()
    fakes = faked(model, f"nearest:{format}")
    arguments = case.arguments(model)
    with torch.no_grad():
        trained = outputs(model, arguments)
        assert [site.name for site in find_sites(model)] == [site.name for site in fakes.work]
        fakes.pack(model)
        packed = outputs(model, arguments)
    assert len(trained) == len(packed) > 0
    for one, other in zip(trained, packed, strict=True):
        if case.exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int4/int4-static", "int3-g32-asym/int8-static", "fp8-e4m3/fp8-e4m3-static"])
def test_so_does_the_artifact_of_a_training(scheme, images, net, tmp_path):
    made = tersor.compress(net, qat(scheme=scheme, num_steps=4), images)
    save(made.model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=Net())
    assert isinstance(loaded.deep, PackedConv)
    assert loaded.deep.input_quantizer.format == scheme.partition("/")[2]
    x = torch.randn(5, 2, 6, 6)
    with torch.no_grad():
        assert torch.equal(loaded(x), made.model.eval()(x))
    assert {report.name: report.scheme for report in made.sites} == dict.fromkeys(
        ["stem", "deep", "head"], f"mse:{scheme}"
    )


def test_products_never_overflow(images, net):
    """Nor do they on the way there: the weights of training are those of packing."""
    options = {"scheme": "int8/int8-static", "num_steps": 8, "learning_rate": 1e-2}
    made = tersor.compress(net, qat(**options), images).model
    for site, packed, _ in packed_sites(made):
        assert keeps_pair_rule(packed.encoded.parts["codes"], site.neighbours(made)), site.name
    free = tersor.compress(net, qat(cpu="vnni", **options), images).model
    assert not all(
        keeps_pair_rule(packed.encoded.parts["codes"], site.neighbours(free)) for site, packed, _ in packed_sites(free)
    )


@pytest.mark.parametrize("scheme", ["mse:int4/int4-static", "gptq:int3/int8-static", "nearest:fp8-e4m3"])
def test_before_the_first_step_it_is_the_weights_step(scheme, images, net):
    """Scales, ranges of inputs, and the weights of a method that moves them."""
    packed = tersor.compress(net, Recipe.of(scheme), images).model
    begun = tersor.compress(net, qat(scheme=scheme, num_steps=1, learning_rate=1e-12, freeze_norms=0), images).model
    for site in find_sites(net):
        assert torch.equal(site.matrix(begun), site.matrix(packed))
    x = torch.randn(5, 2, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(begun.eval()(x), packed.eval()(x))


# The gradients.


def rounded(x):
    """Straight through."""
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("name", ["int4", "int3-g32", "int4-asym", "int2-g32-asym", "int8"])
def test_gradients_are_those_of_lsq(name):
    """Against the formulas of the papers, written with autograd: step sizes with LSQ's factor, zero points with the
    same."""
    torch.manual_seed(2)
    weight, pull = torch.randn(6, 64), torch.randn(6, 64)
    format = format_named(name)
    fake = FakeWeight(format.encode(weight, format.fit(weight, 0.6)), Fold((6, 64)))
    x = weight.clone().requires_grad_()
    (fake(x) * pull).sum().backward()
    low, high = (1 if name == "int8" else 0), 2**format.bits - 1
    size = format.group_size or 64
    step = fake.params()["scale"].float().unsqueeze(-1).requires_grad_()
    middle = 2 ** (format.bits - 1)
    zero = torch.tensor(float(middle)) if format.symmetric else format.zero_point(fake.params()).requires_grad_()
    slow = weight.clone().requires_grad_()
    codes = rounded((slow.view(6, -1, size) / step + zero).clamp(low, high))
    (((codes - zero) * step).view(6, 64) * pull).sum().backward()
    assert torch.equal((((codes - zero) * step).view(6, 64)).detach(), fake(x).detach())
    factor = (size * (middle - 1 if format.symmetric else high)) ** -0.5
    torch.testing.assert_close(x.grad, slow.grad)
    torch.testing.assert_close(
        fake.log_scale.grad, factor * step.grad.squeeze(-1) / step.detach().squeeze(-1), rtol=1e-3, atol=1e-3
    )
    if not format.symmetric:
        expected = factor * zero.grad.squeeze(-1) / step.detach().squeeze(-1).square() / 2**format.bits
        torch.testing.assert_close(fake.zero_fraction.grad, expected, rtol=1e-3, atol=1e-4)


def test_so_are_those_of_inputs():
    torch.manual_seed(3)
    x, pull = torch.randn(8, 12).relu(), torch.randn(8, 12)
    params = IntStatic(4).fit(Stats(sample=0.5 * x))
    fake = FakeInput(Activation("int4-static", params))
    fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    (fake(fast) * pull).sum().backward()
    step, zero = params["scale"].clone().requires_grad_(), params["zero_point"].float()
    quantized = (rounded((slow / step + zero).clamp(-8, 7)) - zero) * step
    (quantized * pull).sum().backward()
    torch.testing.assert_close(fake(fast), quantized)
    torch.testing.assert_close(fast.grad, slow.grad)
    torch.testing.assert_close(fake.log_scale.grad, (12 * 15) ** -0.5 * step.grad / step.detach(), rtol=1e-3, atol=1e-4)
    assert (fast.grad == 0).any(), "what is cut off has no gradient"


def test_dynamic_inputs_pass_gradients_on():
    x = torch.randn(3, 8, requires_grad=True)
    fake = FakeInput(Activation("int8-dynamic"))
    assert torch.equal(fake(x), ACTIVATIONS["int8-dynamic"].fake_quantize(x.detach(), {}))
    fake(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


# Training.


def divergence(model, original, task):
    """Mean KL from the original on the eval split."""
    total = count = 0
    with scoring(model), scoring(original):
        for batch in task.batches("eval"):
            outputs = [task.forward(each, batch) for each in (original, model)]
            total, count = total + kl_divergence(*outputs), count + len(outputs[0])
    return total / count


def test_it_comes_closer_to_the_original_than_rounding_alone(images, net):
    """With every scheme, and by more than half over all of them: how much each gains depends on the processor."""
    trained, rounded = [], []
    for scheme in ("int2", "int2/int6-static", "int2-g32-asym/int8-static"):
        rounded.append(divergence(tersor.compress(net, Recipe.of(f"mse:{scheme}"), images).model, net, images))
        made = tersor.compress(net, qat(scheme=scheme, epochs=5), images)
        trained.append(divergence(made.model, net, images))
        assert made.curves[0].name == "qat"
    assert all(after < before for after, before in zip(trained, rounded, strict=True)), (trained, rounded)
    assert sum(trained) < 0.5 * sum(rounded), (trained, rounded)


def test_scales_are_learned_and_the_original_is_left_alone(images, net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    still, learned = (
        tersor.compress(net, qat(scheme="int4/int4-static", scale_learning_rate=rate), images).model
        for rate in (1e-12, 0.01)
    )
    begun = tersor.compress(net, qat(scheme="int4/int4-static", num_steps=1, learning_rate=1e-12), images).model
    scales = [(model.deep.packed.scale, model.deep.input_quantizer.scale) for model in (begun, still, learned)]
    assert torch.equal(scales[0][0], scales[1][0])
    assert torch.allclose(scales[0][1], scales[1][1])
    assert not torch.allclose(scales[0][0].float(), scales[2][0].float(), rtol=1e-3)
    assert not torch.allclose(scales[0][1], scales[2][1], rtol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_scales_have_no_weight_decay_and_their_own_rate(net):
    model = copy.deepcopy(net)
    faked(model, "int4-g32-asym/int8-dynamic")
    step = QatStep(scheme="int4-g32-asym", weight_decay=0.1, scale_learning_rate=0.5)
    matrices, others, scales = groups(model, step)
    assert {p.ndim for p in matrices["params"]} == {2, 4}
    assert len(matrices["params"]) == 3
    assert matrices["weight_decay"] == 0.1
    assert (len(scales["params"]), scales["weight_decay"], scales["lr"]) == (6, 0.0, 0.5)
    assert len(others["params"]) == 4  # gain and offset of the norm, two biases


@pytest.mark.parametrize("patience", [None, 2])
def test_a_killed_run_packs_what_one_that_was_not_does(patience, images, net, tmp_path, monkeypatch):
    step = QatStep(scheme="int4/int4-static", num_steps=12, batch_size=16, learning_rate=0.01, patience=patience)

    def run():
        job = Job(copy.deepcopy(net), net, images, journal=Journal(tmp_path / "journal", "key", seconds=0))
        step.run(job)
        return job.model.state_dict()

    straight = Job(copy.deepcopy(net), net, images)
    step.run(straight)
    watch = Norms.on_step

    def die(self, done, num_steps):
        watch(self, done, num_steps)
        if done == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Norms, "on_step", die)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(Norms, "on_step", watch)
    resumed = run()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.model.state_dict().items())


@pytest.mark.parametrize("scheme", ["int4", "int3-g32/int8-static", "fp8-e4m3"])
def test_pruned_weights_stay_zero(scheme, images, net):
    model = copy.deepcopy(net)
    masks = Masks(
        {site.name: site.matrix(model).abs() > site.matrix(model).abs().median() for site in find_sites(model)}
    )
    job = Job(model, net, images, masks=masks)
    QatStep(scheme=scheme, num_steps=8, batch_size=32, learning_rate=0.01).run(job)
    for site in find_sites(job.model):
        assert not site.matrix(job.model)[~masks.masks[site.name]].any()
        assert site.matrix(job.model)[masks.masks[site.name]].any()


# Batch norms.


def test_batch_norms_keep_their_statistics_after_a_share_of_the_steps(images, net):
    means = {}
    for share in (0.0, 0.5, 1.0):
        made = tersor.compress(net, qat(scheme="int4", freeze_norms=share, num_steps=8, learning_rate=1e-9), images)
        means[share] = (made.model.norm.running_mean, int(made.model.norm.num_batches_tracked))
    before = int(net.norm.num_batches_tracked)
    assert torch.equal(means[0.0][0], net.norm.running_mean)
    assert not torch.equal(means[1.0][0], net.norm.running_mean)
    assert [count - before for _, count in means.values()] == [0, 4, 8]


def test_a_folded_norm_stays_folded(images, net):
    steps = [
        {"step": "transform", "transform": "fold-bn"},
        *qat(scheme="int4/int8-static", freeze_norms=1).model_dump()["steps"],
    ]
    made = tersor.compress(net, Recipe.validated({"steps": steps}, "the test"), images).model
    assert torch.equal(made.norm.weight, torch.ones(8))
    assert not made.norm.running_mean.any()
    assert made.norm.weight.requires_grad
    assert images.score(made).value > 0.9 * images.score(net).value


def test_the_model_imitates_without_dropout(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    curve = tersor.compress(model, qat(scheme="fp8-e4m3", num_steps=3, learning_rate=1e-9), images).curves[0]
    assert max(curve.losses) < 1e-3
    assert model.training


# Inputs in few bits.


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_integer_inputs_use_all_their_codes(bits):
    torch.manual_seed(4)
    quantizer = IntStatic(bits)
    for sample, lowest in ((torch.randn(256, 32), None), (torch.randn(256, 32).relu(), quantizer.lowest)):
        params = quantizer.fit(Stats(sample=sample))
        codes = quantizer.quantize(sample, params)
        assert (codes.min(), codes.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert lowest is None or params["zero_point"].item() == lowest
        assert not quantizer.fake_quantize(torch.zeros(3), params).any()
        widest = quantizer.fit(Stats(sample=sample[:1] * 0 + sample.abs().max()))
        error, wide = ((quantizer.fake_quantize(sample, p) - sample).square().mean() for p in (params, widest))
        assert error <= wide


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_convolution_takes_quantized_inputs_before_it_pads(mode):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    site, format = find_sites(model)[0], format_named("int8")
    x, weight = torch.randn(2, 3, 5, 5), site.matrix(model)
    params = IntStatic(4).fit(Stats(sample=x.movedim(1, -1).reshape(-1, 3)))
    encoded = format.encode(weight, format.fit(weight))
    bias = model[0].bias
    site.replace(model, encoded, Activation("int4-static", params))
    quantized = IntStatic(4).fake_quantize(x, params)
    padded = nn.functional.pad(quantized, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    torch.testing.assert_close(model(x), conv2d(padded, site.fold.unfold(encoded.decode()), bias))
    assert not torch.allclose(model(x), conv2d(padded, model[0].weight, None))


def test_dynamic_inputs_are_for_linear_layers_only(net):
    made = tersor.compress(net, Recipe.of("int8-dynamic"))
    assert {site.name for site in made.sites if site.activation} == {"head"}


# What is refused, before any training.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "nf4"}, "qat learns the scales of integers and fp8, not of nf4; use int4-g32"),
        ({"scheme": "int4", "rules": {"head": "2:4"}}, "not of 2:4"),
        ({}, "no scheme: say what the model shall be packed in"),
        ({"scheme": "int5-static"}, "did you mean"),
        ({"scheme": "int4", "alpha": 1.5}, "alpha"),
        ({"scheme": "int4", "temperature": 0}, "temperature"),
        ({"scheme": "int4", "freeze_norms": 2}, "freeze_norms"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(InputError, match=message):
        qat(**fields)


def test_models_that_cannot_be(images, net):
    def run(model, masks=None, **fields):
        QatStep(**{"scheme": "int4", "num_steps": 1, **fields}).run(Job(model, net, images, masks=masks or Masks()))

    packed = tersor.compress(net, Recipe.of("int8", exclude=["head"])).model
    with pytest.raises(FormatError, match=r"stem: is packed already.*exclude: \['stem'\]"):
        run(packed)
    with pytest.raises(UnknownName, match="unknown site pattern 'hat'"):
        run(copy.deepcopy(net), rules={"hat": "int8"})
    with pytest.raises(InputError, match="every site is kept"):
        run(copy.deepcopy(net), exclude=("*",))
    masks = Masks({"head": torch.eye(3, 8) > 0})
    with pytest.raises(FormatError, match="head: an earlier step pruned it, and int4-asym has no exact zero; use int4"):
        run(copy.deepcopy(net), masks, scheme="int4-asym")
    with pytest.raises(DataError, match="no train split"):
        QatStep(scheme="int4").run(Job(copy.deepcopy(net), net, None))


def test_sites_that_are_kept_are_trained_in_float(images, net):
    made = tersor.compress(net, qat(scheme="int4", exclude=["head"], num_steps=4), images).model
    assert type(made.head) is nn.Linear
    assert not torch.equal(made.head.weight, net.head.weight)
    assert isinstance(images.score(made), Scores)
