"""AutoRound: a block's output never gets worse than where the descent starts, and clearly better at few bits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from laws import random, same_parts
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.methods.autoround import AutoRound, LearnedRounding
from tersor.methods.gptq import Gptq
from tersor.methods.nearest import Nearest
from tersor.methods.stats import Stats


@dataclass
class Block:
    """Two layers with a nonlinearity and a shortcut, as a block's run.

    Attributes:
        inputs: `[example, position, feature]`.
    """

    weights: dict[str, Tensor]
    inputs: Tensor

    @property
    def num_examples(self) -> int:
        return len(self.inputs)

    def forward(self, weights, x):
        return x + torch.tanh(x @ weights["up"].t()) @ weights["down"].t()

    def __call__(self, weights, examples):
        x = self.inputs[examples]
        return self.forward(weights, x), self.forward(self.weights, x)

    def loss(self, weights):
        output, target = self(weights, torch.arange(self.num_examples))
        return (output - target).square().sum().item()


@pytest.fixture(scope="module")
def block():
    weights = {"up": random(48, 32, seed=1) / 3, "down": random(32, 48, seed=2) / 5}
    mixing = 0.3 * random(32, 32, seed=3) / 32**0.5 + 0.5 * torch.eye(32)
    return Block(weights, random(24, 10, 32, seed=4) @ mixing)


def statistics(block):
    x = block.inputs.flatten(0, 1)
    hidden = torch.tanh(x @ block.weights["up"].t())
    return {name: Stats(second_moment=y.t() @ y / len(y)) for name, y in (("up", x), ("down", hidden))}


def starts(block, method, format):
    stats = statistics(block)
    return {name: method.compress(weight, format, stats[name]) for name, weight in block.weights.items()}


def decoded(encoded):
    return {name: e.decode() for name, e in encoded.items()}


@pytest.mark.parametrize("start", [Nearest(), Gptq()], ids=["nearest", "gptq"])
@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-asym", "int3", "int2-g32", "int2-g32-asym"])
@pytest.mark.parametrize("num_steps", [0, 1, 60])
def test_never_worse_than_where_it_starts(block, name, start, num_steps):
    begun = starts(block, start, FORMATS[name])
    tuned = AutoRound(num_steps=num_steps).tune(block.weights, begun, block)
    assert tuned.keys() == begun.keys()
    assert all(encoded.format == FORMATS[name] for encoded in tuned.values())
    assert block.loss(decoded(tuned)) <= block.loss(decoded(begun))


@pytest.mark.parametrize(("name", "share"), [("int2-g32", 0.8), ("int2-g32-asym", 0.85), ("int3-g32", 0.95)])
def test_clearly_better_at_few_bits(block, name, share):
    method = AutoRound(num_steps=150, num_rounds=0)
    begun = starts(block, method, FORMATS[name])
    tuned = method.tune(block.weights, begun, block)
    assert block.loss(decoded(tuned)) < share * block.loss(decoded(begun))


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym"])
def test_better_than_the_best_start_even_at_many_bits(block, name):
    method = AutoRound()
    begun = starts(block, method, FORMATS[name])
    tuned = method.tune(block.weights, begun, block)
    assert block.loss(decoded(tuned)) < block.loss(decoded(begun))


def test_a_weight_that_no_example_reaches_stays_as_it_started(block):
    """An expert that the calibration data never takes."""
    weights = {**block.weights, "idle": random(8, 32, seed=5)}
    begun = {**starts(block, AutoRound(), FORMATS["int3-g32"])}
    begun["idle"] = AutoRound().compress(weights["idle"], FORMATS["int3-g32"], Stats())
    tuned = AutoRound(num_steps=60).tune(weights, begun, block)
    assert not same_parts(tuned["up"].parts, begun["up"].parts)
    assert same_parts(tuned["idle"].parts, begun["idle"].parts)


def test_the_same_bytes_every_time(block):
    begun = starts(block, AutoRound(), FORMATS["int2-g32"])
    one, other = (AutoRound(num_steps=20).tune(block.weights, begun, block) for _ in range(2))
    assert all(same_parts(one[name].parts, other[name].parts) for name in one)


def test_nothing_it_is_given_is_changed(block):
    begun = starts(block, AutoRound(), FORMATS["int3-g32"])
    before = {name: {key: part.clone() for key, part in e.parts.items()} for name, e in begun.items()}
    weights = {name: weight.clone() for name, weight in block.weights.items()}
    AutoRound(num_steps=20).tune(block.weights, begun, block)
    assert all(same_parts(begun[name].parts, before[name]) for name in begun)
    assert all(torch.equal(block.weights[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["int8", "int8-asym", "int6-g32", "int4-g32", "int3-g32-asym", "int2"])
def test_the_descent_starts_on_the_very_codes(name):
    """Whether the weights fit the codes or not, and whatever the signs of the scales."""
    format, weight = FORMATS[name], random(6, 70)
    begun = Gptq().compress(weight, format, Stats())
    rounded = LearnedRounding(weight, begun)
    torch.testing.assert_close(rounded.weight().detach(), begun.decode())
    assert same_parts(rounded.encoded().parts, begun.parts)


def test_the_gradient_passes_through_the_rounding():
    rounded = LearnedRounding(weight := random(4, 64), Gptq().compress(weight, FORMATS["int3-g32"], Stats()))
    rounded.weight().sum().backward()
    steps = FORMATS["int3-g32"].divisor(rounded.params["scale"]).repeat_interleave(32, dim=1)
    inside = rounded.push.grad != 0
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(rounded.push.grad[inside], steps[inside])


def test_outside_of_blocks_it_is_gptq():
    weight, stats = random(6, 64), Stats()
    ours = AutoRound(num_rounds=2).compress(weight, FORMATS["int3-g32"], stats)
    assert same_parts(ours.parts, Gptq().compress(weight, FORMATS["int3-g32"], stats).parts)


@pytest.mark.parametrize(
    "options",
    [{"num_steps": -1}, {"batch_size": 0}, {"rate": -1.0}, {"scale_rate": -1.0}, {"upstream_correction": 2.0}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match=r"0 or more"):
        AutoRound(**options)
