"""The roofline: bounds by hand, peaks that are measured once and kept, and a bound that real products keep."""

import json

import pytest
import torch

from tersor.analysis import roofline
from tersor.analysis.roofline import WORKING_SETS, Peaks, bound_of, cache_folder, machine_peaks, measure_peaks
from tersor.core.errors import ModelError

PEAKS = Peaks("cpu", "2", 1, {"fp32": 100e9, "int8": 400e9}, {2**20: 100e9, 2**28: 20e9})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def measurements(monkeypatch):
    """How often the machine was measured."""
    counted = []

    def measured(num_threads):
        counted.append(num_threads)
        rates = {str(size): 1e9 * len(counted) for size in WORKING_SETS}
        return {"processor": "x", "torch": "y", "num_threads": num_threads, "macs": {"fp32": 1e9}, "bandwidth": rates}

    monkeypatch.setattr(roofline, "measured_apart", measured)
    return counted


def test_bounds_by_hand():
    in_memory = bound_of(10**9, 10**8, "fp32", 10**8, PEAKS)  # 10 ms of arithmetic, 5 ms of memory
    assert (in_memory.by, in_memory.intensity) == ("compute", 10.0)
    assert in_memory.seconds == pytest.approx(0.01)
    in_int8 = bound_of(10**9, 10**8, "int8", 10**8, PEAKS)  # 2.5 ms of arithmetic
    assert in_int8.by == "memory"
    assert in_int8.seconds == pytest.approx(0.005)


def test_the_ridge_parts_memory_from_arithmetic():
    for precision in PEAKS.macs:
        ridge = PEAKS.ridge(precision, 2**28)
        assert bound_of(int(1e6 * ridge * 1.01), 10**6, precision, 2**28, PEAKS).by == "compute"
        assert bound_of(int(1e6 * ridge * 0.99), 10**6, precision, 2**28, PEAKS).by == "memory"


def test_a_small_working_set_streams_from_the_cache_and_a_huge_one_from_memory():
    assert PEAKS.bandwidth_of(1000) == 100e9
    assert PEAKS.bandwidth_of(2**21) == PEAKS.bandwidth_of(2**40) == 20e9


def test_peaks_are_measured_once_for_each_number_of_threads(cache, measurements):
    first = machine_peaks(1)
    assert machine_peaks(1) == first
    machine_peaks(2)
    assert measurements == [1, 2]
    assert machine_peaks(1, remeasure=True) != first
    assert machine_peaks(1).bandwidth[2**20] == 3e9
    assert measurements == [1, 2, 1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"macs": {}}}'])
def test_a_damaged_cache_is_measured_again(cache, measurements, content):
    cache_folder().mkdir(parents=True)
    (cache_folder() / "peaks.json").write_text(content)
    assert machine_peaks(1) == machine_peaks(1)
    assert measurements == [1]
    json.loads((cache_folder() / "peaks.json").read_text())


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(cache, measurements):
    (cache / "tersor").write_text("a file where the folder should be")
    assert machine_peaks(1).macs == {"fp32": 1e9}


def test_a_failed_measurement_says_why(monkeypatch):
    monkeypatch.setattr(roofline.sys, "executable", "false")
    with pytest.raises(ModelError, match="peaks cannot be measured"):
        roofline.measured_apart(1)


def test_no_product_beats_the_measured_roofline(monkeypatch, one_thread):
    monkeypatch.setattr(roofline, "SECONDS", 0.1)
    monkeypatch.setattr(roofline, "WORKING_SETS", (2**20, 2**22))
    peaks = measure_peaks(1)
    assert peaks.macs["fp32"] > 1e8
    assert all(rate > 1e8 for rate in peaks.bandwidth.values())
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    seconds = roofline.fastest(lambda: a @ b, roofline.run_clock(1))
    assert bound_of(256**3, 3 * 4 * 256**2, "fp32", 2**20, peaks).seconds < 1.3 * seconds
