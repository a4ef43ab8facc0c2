"""Round to nearest: no weight of any format with the plain parameters is closer."""

import pytest
import torch

from laws import odd_weights, same_parts, widened
from tersor.formats import FORMATS
from tersor.methods import Nearest
from tersor.methods.stats import Stats


@pytest.mark.parametrize("name", FORMATS)
def test_is_the_formats_own_fit(name):
    format = FORMATS[name]
    weight = widened(odd_weights()["heavy tails"], format)
    parts = Nearest().compress(weight, format, Stats()).parts
    assert same_parts(parts, format.encode(weight, format.fit(weight)).parts)


def test_half_a_step_at_most():
    weight = odd_weights()["gaussian"]
    encoded = Nearest().compress(weight, FORMATS["int8"], Stats())
    step = encoded.parts["scale"].float()
    assert ((encoded.decode() - weight).abs() <= 0.5 * step * (1 + 1e-3)).all()


def test_sixteen_bit_floats_are_pytorchs():
    weight = odd_weights()["gaussian"]
    assert torch.equal(Nearest().compress(weight, FORMATS["bf16"], Stats()).parts["values"], weight.bfloat16())
