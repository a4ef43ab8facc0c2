"""The integers and scales that clients read of a packed weight give the very numbers that it decodes to."""

import pytest
import torch

from laws import random, widened
from tersor.formats import FORMATS
from tersor.formats.four_bit import FourBit

WEIGHT = random(6, 256, seed=3) * 0.05


def encoded_in(name, num_columns=256):
    weight = widened(WEIGHT[:, :num_columns].contiguous(), FORMATS[name])
    return FORMATS[name].encode(weight, FORMATS[name].fit(weight))


def by_column(per_group, view):
    return per_group.repeat_interleave(view.group_size or view.shape[1], dim=1)[:, : view.shape[1]]


@pytest.mark.parametrize("num_columns", [256, 100])
@pytest.mark.parametrize("name", [name for name in FORMATS if encoded_in(name).integers])
def test_integers_and_scales_are_the_weight(name, num_columns):
    encoded = encoded_in(name, num_columns)
    view = encoded.integers
    steps = view.codes - by_column(view.zero_points, view)
    assert torch.equal(steps * by_column(view.scale.float(), view), encoded.decode())
    assert torch.equal(view.signed_codes, view.codes.short() - 2 ** (view.bits - 1))
    assert view.whole_groups == (not view.group_size or num_columns % view.group_size == 0)
    assert view.symmetric == ("-asym" not in name)
    assert view.plain_int8 == (name == "int8")


def test_the_formats_that_are_integers():
    names = {name for name in FORMATS if encoded_in(name).integers}
    assert names == {name for name in FORMATS if name.startswith("int") and "lowrank" not in name}


ELEMENTS = {
    **{"fp16": "fp16", "bf16": "bf16", "mxfp4": "e2m1", "nvfp4": "e2m1", "nf4": "nf4", "nf4-dq": "nf4"},
    **{f"fp8-{kind}{suffix}": kind for kind in ("e4m3", "e5m2") for suffix in ("", "-tensor")},
}


def test_the_formats_that_are_floats():
    found = {name: view.element for name in FORMATS if (view := encoded_in(name).floats)}
    assert found == ELEMENTS


@pytest.mark.parametrize("name", [name for name in ELEMENTS if not isinstance(FORMATS[name], FourBit)])
def test_floats_and_scales_are_the_weight(name):
    encoded = encoded_in(name)
    view = encoded.floats
    assert view.is_ordinary == (name in ("fp16", "bf16"))
    scale = torch.ones(1, 1) if view.scale is None else view.scale.float()
    assert torch.equal(view.values.float() * scale, encoded.decode())


@pytest.mark.parametrize("name", [name for name in ELEMENTS if isinstance(FORMATS[name], FourBit)])
def test_four_bit_floats_are_codes_with_scales(name):
    encoded, format = encoded_in(name), FORMATS[name]
    view = encoded.floats
    assert view.values is encoded.parts["codes"]
    assert view.group_size == format.group_size
    assert view.nested.keys() == encoded.parts.keys() - {"codes", "scale", "absmax"}
    assert view.scale.shape == (6, 256 // view.group_size)
    scale = format.scale(encoded.parts)
    levels = format.levels.of_code.unique()
    steps = encoded.decode() / by_column(scale, view)
    assert ((steps.unsqueeze(-1) - levels).abs().amin(-1) < 1e-6).all()
