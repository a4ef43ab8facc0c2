"""Models in types that the processor computes slowly: computed in float32, stored as they came."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tersor
from tersor.checkpoint import open as opening
from tersor.checkpoint.open import ModelSpec
from tersor.core import processor
from tersor.jobs.compare import compare
from tersor.jobs.compress import compress
from tersor.jobs.settings import Output, Timing
from tersor.search.choices import Choices
from tersor.tasks.data import Data
from zoo import ZOO

QUICK = Timing(batch_sizes=(1,), timing_seconds=0.1)


@pytest.fixture
def data(tmp_path) -> Data:
    """Some rows of tokens."""
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).integers(1, 20, (12, 8)))
    return Data(path=tmp_path / "rows.npz", options={"max_examples": 4, "calibration_examples": 4})


@pytest.fixture
def slow_halves(monkeypatch):
    """A processor that computes float32 alone fast."""
    monkeypatch.setattr(opening, "computes", lambda dtype: dtype == torch.float32)


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half(request, tmp_path):
    """A language model in two bytes a weight, its folder, and what it computed in at every pass."""
    model = ZOO["llama"].model().to(request.param)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", request.param


def seen_dtypes(monkeypatch) -> set[torch.dtype]:
    """The types of all that linear layers are given from now on."""
    seen, before = set(), torch.nn.Linear.forward

    def forward(self, x):
        seen.add(x.dtype)
        return before(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


@pytest.mark.parametrize("scheme", ["nearest:int8", "gptq:int4-g32"])
def test_work_is_in_float32_and_files_in_what_came(half, data, tmp_path, slow_halves, monkeypatch, scheme):
    folder, dtype = half
    original = load_file(folder / "model.safetensors")
    seen = seen_dtypes(monkeypatch)
    choices = Choices(formats=[scheme], exclude=["*.mlp.*"])
    made = compress(ModelSpec(str(folder)), Output(tmp_path / "out"), data, choices, QUICK)
    assert seen == {torch.float32}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = stored.keys() & original.keys()
    assert {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= kept
    assert all(stored[name].dtype == dtype and torch.equal(stored[name], original[name]) for name in kept)
    assert {site["dtype"] for site in made.manifest["sites"].values()} == {str(dtype).removeprefix("torch.")}
    name = str(dtype).removeprefix("torch.")
    (note,) = [note for note in made.notes if "this processor has no instructions" in note]
    assert f"is in {name}, for which" in note
    assert note.endswith(f"and stored as it came; --dtype {name} computes in that")
    assert {p.dtype for p in made.model.parameters()} == {dtype}
    opened = tersor.load(tmp_path / "out")
    assert {p.dtype for p in opened.parameters()} == {dtype}


def test_a_type_that_was_asked_for_is_kept(half, data, slow_halves, monkeypatch):
    folder, dtype = half
    seen = seen_dtypes(monkeypatch)
    compare([ModelSpec(str(folder), dtype=dtype)], data, timing=QUICK)
    assert seen == {dtype}


def test_a_fast_type_is_kept(half, monkeypatch):
    folder, dtype = half
    monkeypatch.setattr(opening, "computes", lambda dtype: True)
    source = ModelSpec(str(folder)).open_to_run()
    assert source.dtypes is None
    assert {p.dtype for p in source.model.parameters()} == {dtype}


def test_without_memory_for_float32_the_type_stays_and_is_said(half, slow_halves, monkeypatch):
    folder, dtype = half
    monkeypatch.setattr(opening, "available_memory", lambda: 1000)
    source = ModelSpec(str(folder)).open_to_run()
    assert {p.dtype for p in source.model.parameters()} == {dtype}
    assert "there is no memory for it in float32" in source.notes[-1]


@pytest.mark.parametrize(
    ("found", "names", "computed"),
    [
        ({"avx2", "fma"}, ("avx2", "fma"), set()),
        ({"avx2", "fma", "avx512f", "avx512vnni"}, ("avx2", "fma", "avx512", "vnni"), set()),
        (
            {"avx2", "avx512f", "avx512vnni", "amx-int8", "amx-bf16", "avx512fp16"},
            ("avx2", "avx512", "vnni", "amx", "bf16", "fp16"),
            {torch.bfloat16, torch.float16},
        ),
        ({"neon", "asimd", "asimddp", "asimdhp"}, ("neon", "dotprod", "fp16"), {torch.float16}),
        ({"FEAT_DotProd", "FEAT_I8MM", "FEAT_BF16", "neon"}, ("neon", "dotprod", "i8mm", "bf16"), {torch.bfloat16}),
    ],
)
def test_instructions_have_one_name_on_all_systems(monkeypatch, found, names, computed):
    monkeypatch.setattr(processor, "features", lambda: found)
    processor.instruction_sets.cache_clear()
    try:
        assert processor.instruction_sets() == names
        assert {dtype for dtype in processor.FOR_TYPE if processor.computes(dtype)} == computed
        assert processor.computes(torch.float32)
        assert processor.multiplies_bytes() == bool({"vnni", "amx", "dotprod", "i8mm"} & set(names))
    finally:
        processor.instruction_sets.cache_clear()


def test_what_a_mac_says_is_read(monkeypatch):
    text = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_BF16: 0\nhw.optional.neon: 1\n"

    class Done:
        stdout = text

    monkeypatch.setattr(processor.subprocess, "run", lambda *_, **__: Done())
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(processor.binding, "get_host_cpu_features", dict)
    assert processor.features() == {"neon", "FEAT_DotProd"}
