"""Magnitude pruning: exactly as many zeros as asked for, and the largest weights are the ones that stay."""

import pytest
import torch

from laws import random
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Sparse
from tersor.methods import Magnitude
from tersor.methods.mse import Mse
from tersor.methods.stats import Stats


def prune(weight, sparsity):
    encoded = Magnitude(sparsity=sparsity).compress(weight, Bitmask(), Stats())
    return encoded.decode(), encoded


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("shape", [(10, 10), (7, 13), (1, 5), (64, 96)])
def test_exact_to_one_weight(sparsity, shape):
    weight = random(*shape).abs() + 0.1
    pruned, encoded = prune(weight, sparsity)
    num_zeros = int((pruned == 0).sum())
    assert abs(num_zeros - sparsity * weight.numel()) < 1
    assert len(encoded.parts["values"]) == weight.numel() - num_zeros


def test_the_largest_stay_as_they_were():
    weight = random(16, 24)
    pruned, _ = prune(weight, 0.6)
    kept = pruned != 0
    assert weight[kept].abs().min() > weight[~kept].abs().max()
    assert torch.equal(pruned[kept], weight[kept].half().float())


def test_the_site_is_ranked_as_a_whole():
    """Rows of small weights lose more than others."""
    weight = random(4, 100) * torch.tensor([[10.0], [1.0], [1.0], [0.01]])
    zeros = (prune(weight, 0.5)[0] == 0).sum(dim=1)
    assert zeros[0] < zeros[1]
    assert zeros[3] == 100


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_ties_are_broken_by_place(sparsity):
    """As many zeros as ever among equal weights, the first ones, so that two runs agree."""
    pruned, _ = prune(torch.full((4, 8), -0.5), sparsity)
    num_zeros = int(32 * sparsity)
    assert torch.equal(pruned.flatten() == 0, torch.arange(32) < num_zeros)


def test_nothing_is_pruned_at_zero():
    weight = random(5, 6)
    assert torch.equal(prune(weight, 0.0)[0], weight.half().float())


SPARSE = [name for name, format in FORMATS.items() if isinstance(format, Sparse)]


@pytest.mark.parametrize("name", SPARSE)
def test_every_sparse_format_keeps_the_mask_it_chose(name):
    weight = random(8, 128)
    decoded = Magnitude(0.5).compress(weight, FORMATS[name], Stats()).decode()
    mask = FORMATS[name].choose(weight.abs(), 0.5)
    assert int(mask.sum()) == 8 * 64
    assert not decoded[~mask].any()


@pytest.mark.parametrize("name", [name for name in SPARSE if "int" in name])
def test_scales_are_searched_for_what_is_kept(name):
    """No worse than the plain scales of the kept weights, and better than rounding before pruning."""
    weight, format = random(16, 128), FORMATS[name]
    mask = format.choose(weight.abs(), 0.5)

    def error(other):
        return (other - weight)[mask].square().sum()

    plain = format.grid.fit(torch.where(mask, weight, 0.0))
    searched = error(Magnitude(0.5).compress(weight, format, Stats()).decode())
    assert searched <= error(format.fake_quantize(weight, {"mask": mask, **plain}))
    assert format.grid.bits == 8 or searched < 0.999 * error(Mse().compress(weight, format.grid, Stats()).decode())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 50, float("nan")])
def test_what_is_no_fraction_is_refused(sparsity):
    with pytest.raises(InputError, match=r"magnitude: sparsity=.* is not a fraction; give one in \[0, 1\)"):
        Magnitude(sparsity=sparsity)
