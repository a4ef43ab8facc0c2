"""Tensors beyond the limit lie on disk, are the same numbers, and leave nothing behind."""

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from laws import random, same_bits
from tersor.calibration.offload import ActivationCache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0), (2, 3, 4)], ids=str)
def test_the_same_numbers(dtype, shape, folder):
    tensor = (10 * random(*shape)).to(dtype)
    kept = ActivationCache(limit=0).keep(tensor)
    assert same_bits(kept, tensor)
    strided = tensor.expand(4, *shape).transpose(0, -1)
    assert same_bits(ActivationCache(limit=0).keep(strided), strided.contiguous())
    assert list(folder.iterdir()) == []


def test_the_limit_is_kept():
    spill = ActivationCache(limit=100)
    kept = [spill.keep(torch.ones(10)) for _ in range(5)]
    assert (spill.num_bytes_in_memory, spill.num_bytes_on_disk) == (80, 120)
    del kept[0]
    gc.collect()
    assert spill.num_bytes_in_memory == 40
    kept.append(spill.keep(torch.ones(10)))
    assert (spill.num_bytes_in_memory, spill.num_bytes_on_disk) == (80, 120)
    kept.clear()
    gc.collect()
    assert (spill.num_bytes_in_memory, spill.num_bytes_on_disk) == (0, 0)


def test_what_stays_in_memory_is_the_tensor_itself():
    tensor = torch.ones(4)
    assert ActivationCache(limit=16).keep(tensor) is tensor
    assert ActivationCache(limit=15).keep(tensor) is not tensor


def test_later_changes_do_not_reach_the_disk():
    tensor = torch.ones(4)
    kept = ActivationCache(limit=0).keep(tensor)
    tensor.zero_()
    assert kept.tolist() == [1, 1, 1, 1]


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    with pytest.raises(OSError, match="No space left"):
        ActivationCache(limit=0).keep(torch.ones(4))
    assert list(folder.iterdir()) == []
