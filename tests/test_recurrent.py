"""LSTM and GRU layers on packed weights: they are PyTorch's layers, on integers where that pays."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import tersor
from laws import random
from tersor.activations.quantizers import ACTIVATIONS
from tersor.core.errors import InputError
from tersor.kernels import kernel_of, reference
from tersor.kernels.dot import fastest_exact
from tersor.nn.in_place import turn
from tersor.nn.recurrent import PackedRecurrent
from tersor.nn.sites import find_sites


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    """Layers of tests are smaller than those that repay compiling."""
    monkeypatch.setattr("tersor.nn.recurrent.SMALLEST", 0)


KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU}
EACH = pytest.mark.parametrize("kind", KINDS)
SHAPES = [
    dict(zip(("num_layers", "bidirectional", "bias"), values, strict=True))
    for values in product((1, 2), (False, True), (False, True))
]


class Wrapped(nn.Module):
    """A layer inside a model."""

    def __init__(self, kind="LSTM", **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = KINDS[kind](12, 16, **options)

    def forward(self, *args):
        return self.layer(*args)


def packed(kind="LSTM", scheme="int8-dynamic", **options):
    model = Wrapped(kind, **options).eval()
    return model, tersor.compress(model, tersor.Recipe.of(scheme)).model


def stand_in(layer):
    """A layer that runs as packed ones do, with its weights as they are."""
    layer = copy.deepcopy(layer)
    turn(layer, PackedRecurrent, {})
    return layer


def flat(made):
    """Outputs and last states as tensors."""
    y, last = made
    y = pad_packed_sequence(y)[0] if not isinstance(y, torch.Tensor) else y
    return [y, *(last if isinstance(last, tuple) else (last,))]


def same(made, expected, room):
    for one, other in zip(flat(made), flat(expected), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=room, atol=room)


@EACH
@pytest.mark.parametrize("options", SHAPES, ids=str)
@torch.no_grad()
def test_without_packed_weights_it_is_pytorchs_layer(kind, options):
    layer = Wrapped(kind, **options).eval().layer
    mine = stand_in(layer)
    x, num = random(7, 3, 12), options["num_layers"] * (1 + options["bidirectional"])
    states = random(num, 3, 16), random(num, 3, 16, seed=1)
    first = states if kind == "LSTM" else states[0]
    same(mine(x), layer(x), 1e-5)
    same(mine(x, first), layer(x, first), 1e-5)
    one = tuple(state[:, 0] for state in states) if kind == "LSTM" else states[0][:, 0]
    same(mine(x[:, 0], one), layer(x[:, 0], one), 1e-5)
    lengths = [random(length, 12, seed=length) for length in (4, 7, 1)]
    sequence = pack_sequence(lengths, enforce_sorted=False)
    same(mine(sequence, first), layer(sequence, first), 1e-5)


@EACH
@torch.no_grad()
def test_batch_first(kind):
    layer = Wrapped(kind, batch_first=True).eval().layer
    same(stand_in(layer)(random(3, 7, 12)), layer(random(3, 7, 12)), 1e-5)


def textbook(layer, x, first, suffix="l0"):
    """One layer of a packed model in float64, a step and an example at a time, with quantized inputs."""

    def matrix(name):
        return getattr(layer, f"packed_{name}_{suffix}").encoded.decode().double()

    def fake_quantize(values):
        return ACTIVATIONS["int8-dynamic"].fake_quantize(values.float(), {}).double()

    bias = {each: getattr(layer, f"bias_{each}_{suffix}").double() for each in ("ih", "hh")}
    h, c = (state.double() for state in first)
    outputs = []
    for x_t in x:
        of_x = F.linear(fake_quantize(x_t), matrix("weight_ih"), bias["ih"])
        of_h = F.linear(fake_quantize(h), matrix("weight_hh"), bias["hh"])
        if layer.mode == "LSTM":
            i, f, g, o = (of_x + of_h).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (r, z, n), (r_h, z_h, n_h) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            n = (n + (r + r_h).sigmoid() * n_h).tanh()
            z = (z + z_h).sigmoid()
            h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs), h


@EACH
@pytest.mark.parametrize("num_steps", [1, 2, 9])
@torch.no_grad()
def test_integers_give_what_the_textbook_gives(kind, num_steps):
    """A rounding that falls the other way, once in a while, is a hundredth of one state's step."""
    small = packed(kind)[1].layer
    assert isinstance(small, PackedRecurrent)
    assert kernel_of(small) == fastest_exact(small.packed_weight_hh_l0.encoded)
    x, first = random(num_steps, 5, 12), (random(1, 5, 16), random(1, 5, 16, seed=1))
    expected, last = textbook(small, x, (first[0][0], first[1][0]))
    y, states = small(x, first if kind == "LSTM" else first[0])
    room = 1e-5 if num_steps == 1 else 5e-3
    torch.testing.assert_close(y.double(), expected, rtol=room, atol=room)
    states = states[0] if kind == "LSTM" else states
    torch.testing.assert_close(states[0].double(), last, rtol=room, atol=room)


@EACH
@pytest.mark.parametrize("options", SHAPES, ids=str)
@torch.no_grad()
def test_integers_agree_with_decoding(kind, options):
    model, small = packed(kind, **options)
    x = random(9, 4, 12)
    fast = small(x)
    with reference():
        slow = small(x)
    same(fast, slow, 5e-3)
    same(fast, model(x), 0.05)
    assert not all(torch.equal(a, b) for a, b in zip(flat(fast), flat(model(x)), strict=True))


@EACH
@torch.no_grad()
def test_a_state_of_zeros_and_single_examples(kind):
    small = packed(kind)[1]
    for x in (torch.zeros(3, 2, 12), random(3, 1, 12), random(3, 12), random(1, 1, 12)):
        assert all(each.isfinite().all() for each in flat(small(x)))


@EACH
@torch.no_grad()
def test_an_example_does_not_depend_on_its_batch(kind):
    small, x = packed(kind)[1], random(6, 5, 12)
    alone = torch.cat([small(x[:, each : each + 1])[0] for each in range(5)], 1)
    torch.testing.assert_close(small(x)[0], alone, rtol=1e-6, atol=1e-6)


@EACH
def test_inputs_are_left_alone(kind):
    small, x = packed(kind)[1], random(6, 5, 12)
    first = tuple(random(1, 5, 16, seed=seed) for seed in (1, 2))
    before = [tensor.clone() for tensor in (x, *first)]
    with torch.no_grad():
        small(x, first if kind == "LSTM" else first[0])
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *first), strict=True))


@EACH
def test_gradients_pass(kind):
    small, x = packed(kind, num_layers=2)[1], random(4, 2, 12).requires_grad_()
    small(x)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-g32/int8-dynamic", "bf16/fp8-e4m3-dynamic"])
@torch.no_grad()
def test_it_survives_an_artifact(scheme, tmp_path):
    model, small = packed(scheme=scheme, num_layers=2, bidirectional=True)
    tersor.save(small, tmp_path)
    loaded = tersor.load(tmp_path, model=copy.deepcopy(model))
    assert isinstance(loaded.layer, PackedRecurrent)
    same(loaded(random(5, 2, 12)), small(random(5, 2, 12)), 0)
    plain = tersor.load(tmp_path, model=copy.deepcopy(model), packed=False)
    assert [site.name for site in find_sites(plain)] == [site.name for site in find_sites(small)]


@torch.no_grad()
def test_only_some_weights_may_be_packed():
    model = Wrapped().eval()
    small = tersor.compress(model, tersor.Recipe.of("keep", {"*weight_hh*": "int8-dynamic"})).model
    same(small(random(5, 2, 12)), model(random(5, 2, 12)), 0.05)
    assert isinstance(small.layer.weight_ih_l0, nn.Parameter)
    again = tersor.compress(small, tersor.Recipe.of("keep", {"*weight_ih*": "int4"})).model
    assert {site.name for site in find_sites(again)} == {"layer.weight_ih_l0", "layer.weight_hh_l0"}
    assert again.layer.quantizer("weight_ih_l0") is None
    same(again(random(5, 2, 12)), model(random(5, 2, 12)), 0.2)


def test_weights_alone_stay_in_pytorchs_layer():
    """Its fused loop needs no quantized inputs."""
    projected = nn.Sequential(nn.LSTM(12, 16, proj_size=8))
    made = tersor.compress(projected, tersor.Recipe.of("int8-dynamic")).model
    for layer in (packed(scheme="int8")[1].layer, made[0]):
        assert isinstance(layer, nn.LSTM)
        assert not isinstance(layer, PackedRecurrent)


def test_wrong_shapes_are_named():
    small = packed(num_layers=2)[1]
    with pytest.raises(InputError, match=r"LSTM: the first states are \(1, 3, 16\), .* 2 of \(2, 3, 16\)"):
        small(random(4, 3, 12), (random(1, 3, 16),))
    with pytest.raises(InputError, match="1 axes"):
        small(random(4))
