"""Zero mask: the zeros that are there are the mask, and nothing but scales is chosen."""

import pytest
import torch
from torch import nn

import tersor
from laws import random
from tersor.core.errors import FormatError
from tersor.formats import FORMATS
from tersor.formats.contract import Sparse
from tersor.methods import Magnitude, ZeroMask
from tersor.methods.magnitude import encode_masked
from tersor.methods.stats import Stats

SPARSE = [name for name, format in FORMATS.items() if isinstance(format, Sparse)]


def pruned(format, shape=(16, 128), sparsity=0.5, seed=0):
    """Random weights, with the zeros of the format's pattern."""
    weight = random(*shape, seed=seed)
    return torch.where(format.choose(weight.abs(), sparsity), weight, 0.0)


@pytest.mark.parametrize("name", SPARSE)
def test_zeros_stay_zeros_and_what_is_left_is_stored(name):
    format = FORMATS[name]
    weight = pruned(format)
    encoded = ZeroMask().compress(weight, format, Stats())
    decoded = encoded.decode()
    assert not decoded[weight == 0].any()
    assert (decoded - weight).norm() < (0.25 if "int3" in name else 0.12) * weight.norm()
    if "int" not in name:
        assert torch.equal(decoded, weight.half().float())


@pytest.mark.parametrize("name", ["bitmask", "bitmask+int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_the_mask_is_the_weights_own_whatever_its_sparsity(name, sparsity):
    """Magnitude at the same sparsity agrees; at another it does not."""
    weight = pruned(FORMATS[name], sparsity=sparsity)
    ours = ZeroMask().compress(weight, FORMATS[name], Stats())
    same = Magnitude(sparsity).compress(weight, FORMATS[name], Stats())
    assert ours.parts.keys() == same.parts.keys()
    assert all(torch.equal(ours.parts[part], same.parts[part]) for part in ours.parts)
    assert ours.num_bytes != Magnitude(0.5).compress(weight, FORMATS[name], Stats()).num_bytes


@pytest.mark.parametrize("name", [name for name in SPARSE if name.startswith(("2:4", "4:8"))])
def test_a_pattern_that_does_not_fit_is_refused(name):
    weight = random(4, 16)
    with pytest.raises(FormatError, match=r"the mask keeps more than \d of \d columns; use bitmask"):
        ZeroMask().compress(weight, FORMATS[name], Stats())
    model = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(FormatError, match=r"0: .*keeps more than .* or exclude it with --exclude '0'"):
        tersor.compress(model, tersor.Recipe.of(f"zero-mask:{name}"))


@pytest.mark.parametrize("name", ["2:4", "2:4+int8"])
def test_fewer_weights_than_the_pattern_holds_are_fine(name):
    weight = torch.where(torch.rand(8, 64) < 0.1, random(8, 64).sign() + 0.1, 0.0)
    weight = torch.where(FORMATS[name].choose(weight.abs()), weight, 0.0)
    decoded = ZeroMask().compress(weight, FORMATS[name], Stats()).decode()
    assert torch.equal(decoded != 0, weight != 0)


def test_scales_follow_the_columns_that_matter():
    """The error in columns of much curvature is no larger than without knowing it."""
    format = FORMATS["bitmask+int3-g64"]
    weight, importance = pruned(format), torch.ones(128)
    importance[::8] = 100.0

    def error(stats):
        squares = (ZeroMask().compress(weight, format, stats).decode() - weight).square()
        return (squares * importance).sum()

    assert error(Stats(column_weight=importance)) < error(Stats())


def test_a_mask_of_another_method_is_encoded_alike():
    format, weight = FORMATS["bitmask+int4-g64"], random(8, 64)
    mask = torch.rand(8, 64) < 0.5
    by_mask = encode_masked(weight, mask, format, Stats())
    by_zeros = ZeroMask().compress(torch.where(mask, weight, 0.0), format, Stats())
    assert all(torch.equal(by_mask.parts[part], by_zeros.parts[part]) for part in by_mask.parts)
