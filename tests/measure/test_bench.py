"""The bench: it finds a planted difference and calls no other, refuses what cannot be compared, and measures memory."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cli_runner
import tersor
from tersor.cli.options import models_of
from tersor.core.errors import InputError
from tersor.jobs.bench import Candidate, bench, candidates_of
from tersor.jobs.settings import Timing
from tersor.measure import latency
from tersor.measure.latency import Latency, measure_calls
from tersor.measure.memory import measure_opened

MODELS = '''
import time
import torch
from torch import nn


class Slow(nn.Module):
    """A layer, and some sleep."""

    def __init__(self, seconds):
        super().__init__()
        self.layer, self.seconds = nn.Linear(8, 8), seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.layer(x)


def slow():
    return Slow(0.02)


def fast():
    return Slow(0.01)


def large():
    return nn.Linear(8000, 2500)  # 80 MB


def eight():
    return nn.Linear(8, 4)
'''


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "bench_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("bench_models", None)


def test_a_planted_difference_is_called_and_equal_models_are_not(models, clock):
    names = ["bench_models:slow", "bench_models:fast", "bench_models:slow"]
    found = bench(candidates_of(names), timing=Timing((2,), seconds=0.6, memory=False))
    first, faster, same = found.timings
    assert (first.difference, faster.difference, same.difference) == (
        "no difference measured",
        "faster",
        "no difference measured",
    )
    assert faster.latency.speedup == pytest.approx(2)
    assert found.memory == (None, None, None)
    assert found.versions[0].startswith("torch ")
    assert "made-up inputs: x [2, 8]" in found.inputs


@pytest.mark.parametrize(
    ("interval", "noise", "expected"),
    [
        ((1.2, 1.4), (0.98, 1.02), "faster"),
        ((0.6, 0.9), (0.98, 1.02), "slower"),
        ((0.99, 1.4), (0.98, 1.02), "no difference measured"),
        ((1.2, 1.4), (0.8, 1.25), "no difference measured"),  # the first differs as much from itself
        ((0.8, 0.97), (0.96, 1.02), "no difference measured"),
    ],
)
def test_a_difference_that_the_noise_swallows_is_none(interval, noise, expected):
    assert Latency(1, 1, 9, 1.0, 1.0, 1.0, interval).difference(noise) == expected


def test_calls_are_timed_in_turn_and_in_changing_order():
    order: list[int] = []
    measure_calls([lambda: order.append(0), lambda: order.append(1)], batch_size=1, num_rounds=20)
    rounds = np.array(order[4:]).reshape(-1, 2)  # after the warm-up
    assert len(rounds) == 20
    assert (np.sort(rounds, axis=1) == [0, 1]).all()
    assert len({tuple(each) for each in rounds.tolist()}) == 2


def test_percentiles_and_the_spread_are_those_of_the_rounds(monkeypatch):
    times = iter([0.5, 0.5, *[0.01, 0.03] * 8])  # after the warm-up
    monkeypatch.setattr(latency, "timed", lambda call, clock: next(times))
    (found,) = measure_calls([lambda: None], batch_size=1, num_rounds=16)
    assert (found.p50, found.p95) == pytest.approx((20, 30))
    assert found.spread == pytest.approx(1.0)  # the quartiles are 20 ms apart


def test_memory_holds_the_weights_and_goes_with_the_model(models):
    found = measure_opened("bench_models:large", "torch", {"input": np.zeros((4, 8000), np.float32)})
    if found is None:
        pytest.skip("this kernel does not tell")
    assert 75e6 < found.loaded < 120e6
    assert found.loaded <= found.peak < 200e6


def test_memory_of_the_smallest_model_is_that_of_its_tensors(models):
    found = measure_opened("bench_models:eight", "torch", {"input": np.zeros((4, 8), np.float32)})
    if found is None:
        pytest.skip("this kernel does not tell")
    assert found.peak >= found.loaded >= 4 * (8 * 4 + 4)


def test_what_cannot_be_compared_is_refused(models):
    with pytest.raises(InputError, match="2 --runtime for 3 models"):
        candidates_of(["a.onnx"] * 3, ["onnx", "openvino"])
    with pytest.raises(InputError, match="1 --weights for 0 models"):
        models_of(["a.onnx"], [models / "w.safetensors"], None)
    with pytest.raises(InputError, match="--length and --shape are for made-up inputs"):
        tersor.bench("bench_models:slow", length=3, task="fidelity")


def test_processor_time_is_that_of_this_process_and_of_one_thread(models):
    sleeper = candidates_of(["bench_models:slow"])
    quick = Timing((1,), seconds=0.1, memory=False)
    on_the_wall, busy = (bench(sleeper, timing=replace(quick, cpu_time=cpu)) for cpu in (False, True))
    assert on_the_wall.timings[0].latency.p50 > 15
    assert busy.timings[0].latency.p50 < 10  # it sleeps for 20
    with pytest.raises(InputError, match="use it with --threads 1"):
        Timing(threads=(1, 2), cpu_time=True)


def test_one_runtime_is_for_all_models_and_several_are_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.onnx", "b.onnx", "b.xml"):
        Path(name).touch()
    assert [c.runtime for c in candidates_of(["a.onnx", "b.onnx"], ["openvino"])] == ["openvino"] * 2
    assert [c.runtime for c in candidates_of(["a.onnx", "a.onnx"], ["onnx", "openvino"])] == ["onnx", "openvino"]
    assert candidates_of(["a.onnx", "b.xml"]) == [Candidate("a.onnx", "onnx"), Candidate("b.xml", "openvino")]


def test_the_command_prints_tables_or_one_json_object(models, capsys):
    flags = ["--batch", "1,2", "--seconds", "0.05", "--no-memory"]
    shown = cli_runner.tersor(capsys, "bench", "bench_models:eight", "bench_models:eight", *flags)
    assert shown.status == 0, shown.stderr
    assert "against itself" in shown.stdout
    found = cli_runner.tersor(capsys, "bench", "bench_models:eight", "bench_models:slow", *flags, "--json").json
    assert [timing["latency"]["batch_size"] for timing in found["timings"]] == [1, 1, 2, 2]
    assert found["timings"][1]["difference"] == "slower"
    json.dumps(found)


def test_bad_flags_are_one_message(models, capsys):
    for flags, message in (
        (["--threads", "0"], "--threads '0' is not a list of whole numbers from 1"),
        (["--shape", "3,x"], "--shape '3,x' is not a list of whole numbers from 1; write for example 3,224,224"),
        (["--runtime", "onnx"], "onnx opens .onnx"),
    ):
        found = cli_runner.tersor(capsys, "bench", "bench_models:eight", *flags)
        assert found.status == 2
        assert message in found.stderr.replace("\n", " ")


def test_explain_prints_tables_or_one_json_object(models, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(models))
    from tersor.analysis import roofline

    rates = {str(size): 1e10 for size in roofline.WORKING_SETS}
    peaks = {"processor": "", "torch": "", "num_threads": 1, "macs": {"fp32": 1e10, "int8": 4e10}, "bandwidth": rates}
    monkeypatch.setattr(roofline, "measured_apart", lambda num_threads: peaks)
    words = ["explain", "bench_models:eight", "--against", "bench_models:eight", "--seconds", "0.1"]
    shown = cli_runner.tersor(capsys, *words)
    assert shown.status == 0, shown.stderr
    assert "where a run's time goes" in shown.stdout
    assert "layers left in float" in shown.stdout
    found = cli_runner.tersor(capsys, *words, "--json").json
    assert found["peaks"]["macs"] == {"fp32": 1e10, "int8": 4e10}
    assert found["explanation"]["layers"][0]["time"]["macs"] == 32
