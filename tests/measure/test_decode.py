"""Decoding benches: tokens are read in the order and number that was asked for, and a planted difference is called."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cli_runner
from tersor import export
from tersor.core.errors import InputError, MissingExtra, ModelError
from tersor.jobs import decode
from tersor.jobs.bench import Candidate, bench
from tersor.jobs.decode import decode as decode_bench
from tersor.jobs.settings import Timing
from tersor.runtimes import RUNTIMES, open_decoder
from zoo import ZOO


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A small Llama and its ONNX file."""
    folder = tmp_path_factory.mktemp("llama")
    ZOO["llama"].model().save_pretrained(folder / "model")
    export(folder / "model", folder / "model.onnx", to="onnx")
    return folder


SHORT = ["--seconds", 0.1, "--no-memory"]


class Counting:
    """Notes what it is fed; a token takes it some time."""

    def __init__(self, seconds: float):
        self.seconds, self.fed = seconds, []

    def reset(self):
        self.fed.append([])

    def feed(self, ids, mask=None):
        self.fed[-1].append(ids.copy())
        time.sleep(self.seconds * ids.shape[1])


def test_reads_the_prompt_at_once_and_calls_a_planted_difference(monkeypatch, clock):
    decoders = {"slow": Counting(0.002), "fast": Counting(0.001)}
    monkeypatch.setattr(decode, "open_decoder", lambda model, runtime, **_: decoders[model])
    candidates = [Candidate("slow", "torch"), Candidate("fast", "torch")]
    found = decode_bench(candidates, 5, 3, Timing(seconds=0.1, memory=False))
    slow, fast = found.timings
    assert slow.tokens_per_second == pytest.approx(1e3 / slow.token.p50)
    assert slow.token.p50 == pytest.approx(2)
    assert fast.token.speedup == pytest.approx(2)
    assert fast.difference == "faster"
    assert slow.prompt.p50 == pytest.approx(10)
    texts = [fed for decoder in decoders.values() for fed in decoder.fed if len(fed) > 2]
    assert {tuple(ids.shape for ids in fed) for fed in texts} == {((1, 5), (1, 1), (1, 1), (1, 1))}
    assert len({np.concatenate(fed, axis=1).tobytes() for fed in texts}) == 1  # all are fed the same


def test_decoders_of_two_runtimes_from_the_command_line(llama, capsys):
    files = [llama / "model", llama / "model.onnx"]
    found = cli_runner.tersor(capsys, "bench", *files, "--new-tokens", 4, "--prompt", 6, *SHORT, "--json").json
    assert (found["num_prompt"], found["num_new"]) == (6, 4)
    assert [timing["candidate"]["runtime"] for timing in found["timings"]] == ["torch", "onnx"]
    assert all(timing["tokens_per_second"] > 0 for timing in found["timings"])
    table = cli_runner.tersor(capsys, "bench", files[1], "--new-tokens", 2, "--prompt", 3, *SHORT).stdout
    assert "writing 2 tokens after 3" in table
    assert "against itself" in table


@pytest.mark.slow
def test_memory_of_decoding(llama):
    found = decode_bench([Candidate(str(llama / "model.onnx"), "onnx")], 8, 2, Timing(seconds=0.1))
    (memory,) = found.memory
    assert memory is None or memory.peak >= memory.loaded > 0


def test_what_cannot_be_measured_is_refused(llama, capsys, tmp_path, monkeypatch):
    candidate = Candidate(str(llama / "model.onnx"), "onnx")
    with pytest.raises(InputError, match=r"cache: measure how fast it writes with --new-tokens 64"):
        bench([candidate], timing=Timing((1,), memory=False))
    with pytest.raises(InputError, match="1 or more"):
        decode_bench([candidate], num_new=0)
    with pytest.raises(InputError, match="--threads 1"):
        Timing(threads=(1, 2), cpu_time=True)
    refused = cli_runner.tersor(capsys, "bench", llama / "model.onnx", "--new-tokens", 4, "--length", 3)
    assert refused.status == 2
    assert "leave --length out" in refused.stderr
    ZOO["bert"].model().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="writes no text"):
        decode_bench([Candidate(str(tmp_path / "bert"), "torch")])
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingExtra, match="llama"):
        open_decoder(str(tmp_path / "model.gguf"))
    assert RUNTIMES["llama.cpp"].suffixes == (".gguf",)
