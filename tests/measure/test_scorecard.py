"""Sizes, operations, latency and memory: each against what can be counted by hand or must be so."""

import time

import pytest
import torch
from torch import nn

import tersor
from tersor.checkpoint.container_write import size_of
from tersor.measure.latency import measure_latency
from tersor.measure.memory import measure_peak_memory
from tersor.measure.size import measure_size
from tersor.nn.macs import count_macs


def packed(model: nn.Module, scheme: str) -> nn.Module:
    return tersor.compress(model, tersor.Recipe.of(scheme)).model


def test_size_counts_parameters_nonzeros_and_bytes_by_hand():
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))
    size = measure_size(model)
    assert size.num_parameters == 64 * 32 + 32 + 32 + 32
    assert size.num_nonzeros == size.num_parameters - 32  # the normalization's bias starts at zero
    assert size.num_bytes == 4 * (64 * 32 + 32 + 4 * 32) + 8  # running mean and variance; a 64-bit counter
    small = measure_size(packed(model, "int4-g32"))
    assert small.num_parameters == size.num_parameters
    assert small.num_bytes == size.num_bytes - 4 * 64 * 32 + 64 * 32 // 2 + 2 * 32 * 2


def test_pruned_weights_are_not_counted_as_nonzero():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    assert measure_size(packed(model, "magnitude(sparsity=0.75):bitmask")).num_nonzeros == 64 * 32 // 4


def test_tied_weights_are_counted_once():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    assert measure_size(model).num_parameters == 50 * 16
    assert measure_size(packed(model, "int8")).num_parameters == 50 * 16
    assert size_of(packed(model, "int8")) < 50 * 16 + 2 * 50 + 400


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic"])
def test_macs_are_those_of_the_model_whatever_it_is_stored_as(scheme):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    x = torch.zeros(2, 3, 4, 4)
    expected = 2 * (8 * 16 * 27 + 8 * 16 * 10)
    assert count_macs(model, lambda m: m(x)) == expected
    assert count_macs(packed(model, scheme), lambda m: m(x)) == expected


class Sleeper(nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def forward(self) -> None:
        time.sleep(self.seconds)


def test_latency_finds_a_planted_difference_and_no_other(clock):
    models = [Sleeper(0.02), Sleeper(0.01), Sleeper(0.02)]
    first, faster, same = measure_latency(models, lambda model: model(), batch_size=1, num_rounds=25)
    assert first.speedup == 1
    assert first.p50 == pytest.approx(20)
    assert faster.speedup == pytest.approx(2)
    assert faster.speedup_interval[0] > 1.5
    assert same.speedup == pytest.approx(1)


def test_latency_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    seen = []
    measure_latency([nn.Identity()], lambda model: seen.append(torch.get_num_threads()), batch_size=1, num_rounds=8)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


class Allocator(nn.Module):
    def forward(self, megabytes: int) -> None:
        torch.ones(megabytes * 2**18)


def test_peak_memory_sees_what_a_pass_allocates():
    small = measure_peak_memory(Allocator(), lambda model: model(8), num_bytes=0)
    large = measure_peak_memory(Allocator(), lambda model: model(256), num_bytes=1000)
    if small is None or large is None:
        pytest.skip("this kernel does not tell its high-water mark")
    assert 250 * 2**20 < large < 290 * 2**20
    assert small < 40 * 2**20
