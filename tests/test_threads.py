"""The number of threads changes no byte of what sums, decompositions, solvers and searches make.

The layer is wide enough, and its inputs are many enough, that the libraries share the work among threads; its own
products are ones that they part alike, which holds for most models and not for all (docs/concepts.md)."""

import pytest
import torch
from torch import nn

import tersor
from laws import random, same_bits
from tersor.core.threads import threads
from tersor.search.plan import plan
from test_walk import Toy

WIDE, NARROW = 384, 192
SCHEMES = [
    *("gptq:int4-g32", "gptq:int2-g64", "sparsegpt:bitmask", "svd:lowrank", "lqer:int2-g64+lowrank"),
    *("waterfill:coded", "waterfill(num_states=8):coded", "kmeans:codebook4", "nearest:coded"),
]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, NARROW)).eval()


def task():
    return Toy([random(256, 16, WIDE, seed=1) @ random(WIDE, WIDE, seed=2) / WIDE**0.5])


def assert_threads_do_not_matter(made):
    """The model on two threads is the one on one thread."""
    states = []
    for num_threads in (1, 2):
        with threads(num_threads):
            states.append(made().model.state_dict())
    one, two = states
    assert one.keys() == two.keys()
    assert not [name for name, tensor in one.items() if not same_bits(tensor, two[name])]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_number_of_threads_changes_no_byte(scheme):
    assert_threads_do_not_matter(lambda: tersor.compress(model(), scheme, task()))


@pytest.mark.parametrize(("size", "candidates"), [("40KB", "gptq:int3-g64,int4-g64,int8"), ("120KB", "coded")])
def test_nor_of_what_a_size_plans(size, candidates):
    def planned():
        recipe = plan(model(), task(), size=size, candidates=candidates.split(","))
        return tersor.compress(model(), recipe, task())

    assert_threads_do_not_matter(planned)


@pytest.mark.parametrize("scheme", ["nearest:nf4-dq", "nearest:coded"])
def test_nor_of_a_mean_over_many_groups(scheme):
    """Without calibration data there is nothing else to sum."""
    layer = nn.Sequential(nn.Linear(4096, 700, bias=False))  # 44,800 groups of 64
    assert_threads_do_not_matter(lambda: tersor.compress(layer, scheme))
