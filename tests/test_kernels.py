"""Kernels: they compute what the reference computes, are chosen by measurement, and say so."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn

import tersor
from laws import random
from tersor.activations.quantizers import ACTIVATIONS, Activation
from tersor.core.errors import InputError
from tersor.core.threads import threads
from tersor.formats import format_named
from tersor.formats.contract import Encoded
from tersor.formats.overflow import keeps_pair_rule
from tersor.kernels import choice, choices, dot, kernel_of, reference
from tersor.kernels.int8 import FLOAT, INT_MM, ONEDNN, qlinear_is_exact
from tersor.measure.size import measure_size
from tersor.methods.stats import Stats
from tersor.nn.packed import Fold, PackedLinear, PackedWeight, pack_layer
from tersor.nn.sites import find_sites


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Every test measures for itself."""
    monkeypatch.setattr(choice, "CHOICE", choice.KernelChoice())


def layer(format, activation=None, shape=(64, 128), dtype=torch.float32, bias=True):
    weight = random(*shape, seed=1)
    encoded = format_named(format).encode(weight, format_named(format).fit(weight))
    quantizer = None
    if activation:
        quantizer = Activation(activation, ACTIVATIONS[activation].fit(Stats(sample=random(64, shape[1]) + 0.5)))
    linear = nn.Linear(shape[1], shape[0])
    linear.bias = nn.Parameter(random(shape[0], seed=2).to(dtype)) if bias else None
    pack_layer(linear, PackedLinear, PackedWeight(encoded, Fold(shape), dtype), quantizer)
    return linear.eval()


def names_of(module, dtype):
    """The kernels that fit a layer."""
    packed, quantizer = module.packed, module.input_quantizer
    fitting = packed.memory.kernels(packed.encoded, quantizer.activation if quantizer else None, dtype)
    return {kernel.name for kernel in fitting}


def only(monkeypatch, name):
    """Have a kernel be the fastest wherever it fits."""
    monkeypatch.setattr(choice, "HOPELESS", float("inf"))
    monkeypatch.setattr(choice, "fastest", lambda times: name if name in times else next(iter(times)))


@torch.no_grad()
def both(module, x):
    with reference():
        slow = module(x)
    return module(x), slow


BF16 = {
    "int8pack": ["int8"],
    "int4pack": ["int4-g32", "int4-g64", "int4-g128", "int4-g32-asym", "int4-g128-asym"],
}


@pytest.mark.parametrize(("kernel", "format"), [(kernel, f) for kernel, formats in BF16.items() for f in formats])
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_weights_times_bfloat16(monkeypatch, kernel, format, num_tokens):
    """About as far from the exact result as decoding to bfloat16 is, whose scales are not rounded, but weights are."""
    only(monkeypatch, kernel)
    module, x = layer(format, dtype=torch.bfloat16), random(num_tokens, 128).bfloat16()
    fast, slow = both(module, x)
    assert kernel_of(module, num_tokens) == kernel
    exact = x.double() @ module.packed.encoded.decode().double().t() + module.bias.double()
    assert fast.dtype is torch.bfloat16
    spread = (slow.double() - exact).square().mean().sqrt()
    assert (fast.double() - exact).square().mean().sqrt() <= 2.5 * spread
    assert (fast.double() - exact).abs().max() <= 2**-5 * exact.abs().max()


def test_only_models_in_bfloat16_get_them():
    for format in ("int8", "int4-g32"):
        for dtype in (torch.float32, torch.float16):
            assert not {"int8pack", "int4pack"} & names_of(layer(format, dtype=dtype), dtype)


@pytest.mark.parametrize("shape", [(24, 128), (64, 100), (17, 70), (1, 32), (3, 3)])
@pytest.mark.parametrize("format", ["int8", "int4-g32", "int4-g64", "int4"])
def test_shapes_the_kernels_for_bfloat16_cannot_take_are_decoded(format, shape):
    """Some of them would end the process."""
    module = layer(format, dtype=torch.bfloat16, shape=shape)
    fast, slow = both(module, random(4, shape[1]).bfloat16())
    assert torch.equal(fast, slow)
    assert names_of(module, torch.bfloat16) == {"decoded", "decode"}


FLOAT_INPUTS = ["int8", "int4-g64", "int4-g32-asym", "int3-g32", "int2-g64", "int8-g64"]


@pytest.mark.parametrize("format", FLOAT_INPUTS)
@pytest.mark.parametrize("shape", [(513, 130), (16, 4096), (1, 65536), (65537, 1)])
@torch.no_grad()
def test_weights_are_unpacked_in_registers(monkeypatch, format, shape):
    """As far from the exact product with the decoded weight as float sums are. Groups and panels may end early."""
    only(monkeypatch, "unpack")
    module = layer(format, shape=shape)
    for num_tokens in (1, 3, 8, 13, 30):
        x = random(num_tokens, shape[1])
        exact = x.double() @ module.packed.encoded.decode().double().t() + module.bias.double()
        y = module(x)
        assert kernel_of(module, num_tokens) == "unpack"
        room = 2**-23 * (x.abs().double() @ module.packed.encoded.decode().abs().double().t()).max().item()
        assert (y.double() - exact).abs().max().item() <= 8 * room
    bare, x = layer(format, shape=shape, bias=False), random(3, shape[1])
    for dtype in (torch.bfloat16, torch.float16):
        like = bare(x.to(dtype))
        assert like.dtype is dtype
        torch.testing.assert_close(like.float(), bare(x.to(dtype).float()), rtol=2**-7, atol=1e-2)


@torch.no_grad()
def test_a_decoded_weight_stays_what_it_is_to_the_bit(monkeypatch):
    """One input of one, all others zero: out comes a column of the weight."""
    only(monkeypatch, "unpack")
    module = layer("int4-g64", shape=(512, 160), bias=False)
    for num_tokens in (1, 5, 160):
        y = module(torch.eye(160)[:num_tokens])
        assert torch.equal(y, module.packed.encoded.decode()[:, :num_tokens].t())


def test_a_loaded_state_is_laid_out_anew(monkeypatch):
    only(monkeypatch, "unpack")
    module, other = (layer("int4-g64", shape=(512, 160)) for _ in range(2))
    other.packed._buffers["scale"].mul_(3)
    with torch.no_grad():
        module(random(2, 160))
        module.load_state_dict(other.state_dict())
        assert torch.equal(module(random(2, 160)), other(random(2, 160)))


@pytest.mark.parametrize(
    ("format", "activation"), [("int4-g64", None), ("int8", None), ("int8", "int8-dynamic"), ("int8", "int8-static")]
)
def test_a_weight_that_is_written_to_is_laid_out_anew(format, activation):
    """Codes that overflow 16 bits where the old ones did not, too: the kernel is chosen anew, and the input's scale."""
    changed = layer(format, activation, shape=(512, 160))
    x = random(4, 160)
    with torch.no_grad():
        changed(x), changed(x)
        changed.packed.tensors["codes"].fill_(127)
        changed.packed.tensors["scale"].mul_(3)
        if activation == "int8-static":
            changed.input_quantizer.tensors["scale"].mul_(2)
        with reference():
            expected = changed(x)
        torch.testing.assert_close(changed(x), expected)
        torch.testing.assert_close(changed(x), expected)


def loudest(shape, signs):
    """An int8 weight of the largest codes, in columns or rows of one sign."""
    format = format_named("int8")
    codes = {
        "rows": torch.where(torch.arange(shape[0]) % 2 == 0, 127, -127).view(-1, 1).expand(shape),
        "pairs": torch.where(torch.arange(shape[1]) % 2 == 0, 127, 1).view(1, -1).expand(shape),
        "all": torch.full(shape, -127),
    }[signs]
    return Encoded(format, shape, {"codes": codes.to(torch.int8).contiguous(), "scale": torch.ones(shape[0], 1).half()})


def rows_for(encoded, activation):
    """The rows of the table that multiply integers and are exact with a weight on this processor, whatever its size."""
    here = [kernel for kernel in dot.DOT if dot.instruction_named(kernel.name) is not None]
    if not keeps_pair_rule(encoded.parts["codes"]):
        here = [kernel for kernel in here if kernel.name != "vpmaddubsw"]
    fitting = [kernel for kernel in (INT_MM, FLOAT, ONEDNN) if kernel.fits(encoded, activation, torch.float32)]
    return [*here, *fitting]


ADVERSE = {
    "one column": ((5, 1), "rows"),
    "one row": ((1, 33), "all"),
    "odd columns": ((17, 127), "rows"),
    "many odd columns": ((50, 2051), "all"),
    "neighbours of 128 together": ((48, 255), "pairs"),
    "whole panels": ((64, 256), "pairs"),
}


@pytest.mark.parametrize("activation", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("case", ADVERSE)
def test_all_rows_of_integers_give_the_same_bits(monkeypatch, activation, case):
    """So what is chosen does not change a result. The largest codes there are: every sum of 16 bits that could
    overflow does."""
    monkeypatch.setattr("tersor.kernels.int8.LARGE", 0)
    encoded = loudest(*ADVERSE[case])
    num_rows, num_columns = encoded.shape
    params = {"scale": torch.tensor([0.5]), "zero_point": torch.tensor([-127], dtype=torch.int8)}
    quantizer = Activation(activation, params if activation == "int8-static" else {})
    exact_scales = {**encoded.parts, "scale": torch.ones(num_rows, 1)}
    kernels = rows_for(encoded, quantizer)
    assert len(kernels) >= 2
    for num_tokens in (1, 2, 3, 5, 6, 8, 19):
        loud = torch.where(torch.arange(num_tokens) % 3 == 0, -64.0, 127.0).view(-1, 1).expand(num_tokens, num_columns)
        for x, bias in ((loud, None), (random(num_tokens, num_columns) * 50, random(num_rows))):
            made = {
                each.name: each.run(x, encoded, quantizer, each.lay_out(encoded, quantizer), bias) for each in kernels
            }
            first = next(iter(made.values()))
            for name, y in made.items():
                assert torch.equal(y, first), f"{name} at {num_tokens} tokens"
        exact = (
            quantizer.fake_quantize(loud).double()
            @ Encoded(encoded.format, encoded.shape, exact_scales).decode().double().t()
        )
        torch.testing.assert_close(made_of(kernels[0], loud, encoded, quantizer).double(), exact, rtol=1e-6, atol=0)


def made_of(kernel, x, encoded, quantizer):
    return kernel.run(x, encoded, quantizer, kernel.lay_out(encoded, quantizer), None)


@pytest.mark.parametrize("activation", ["int8-dynamic", "int8-static"])
def test_values_that_are_no_numbers_do_not_leave_their_token(monkeypatch, activation):
    """And tokens of zeros, of the tiniest and of the largest values are what the reference makes of them."""
    module = layer("int8", activation, shape=(64, 1024))
    only(monkeypatch, dot.fastest_exact(module.packed.encoded))
    x = random(6, 1024)
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e30
    with torch.no_grad():
        calm = module(x)
        x[0, 5] = float("nan")
        y = module(x)
    assert kernel_of(module, 6) == dot.fastest_exact(module.packed.encoded)
    assert torch.equal(y[1:], calm[1:])
    assert calm.isfinite().all()
    assert y[0].isnan().all() == (activation == "int8-dynamic"), "static codes have none for it"
    fast, slow = both(module, x[1:])
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * slow.abs().max().item())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bit(monkeypatch, num_threads):
    module = layer("int8", "int8-dynamic", shape=(330, 512))
    only(monkeypatch, dot.fastest_exact(module.packed.encoded))
    for num_tokens in (1, 40, 9):
        x = random(num_tokens, 512)
        with torch.no_grad(), threads(1):
            alone = module(x)
        with torch.no_grad(), threads(num_threads):
            assert torch.equal(module(x), alone)


def test_inputs_may_lie_apart_and_in_any_type(monkeypatch):
    module = layer("int8", "int8-dynamic", shape=(96, 1024), bias=False)
    only(monkeypatch, dot.fastest_exact(module.packed.encoded))
    x = random(7, 3, 1024)
    with torch.no_grad():
        assert torch.equal(module(x[:, 1]), module(x[:, 1].contiguous()))
        for dtype in (torch.float16, torch.bfloat16):
            y = module(x.to(dtype))
            assert y.dtype is dtype
            torch.testing.assert_close(y.float(), module(x.to(dtype).float()), rtol=2**-7, atol=2**-7)


def test_a_kernel_that_overflows_is_not_used(monkeypatch):
    """As oneDNN's does on processors without VNNI, where two products are added in 16 bits."""
    exact = torch.ops.onednn.qlinear_pointwise
    monkeypatch.setattr("tersor.kernels.int8.LARGE", 0)
    monkeypatch.setattr(
        torch.ops.onednn, "qlinear_pointwise", lambda *args: exact(*args).clamp(-2e6, 2e6), raising=False
    )
    qlinear_is_exact.cache_clear()
    try:
        module = layer("int8", "int8-dynamic")
        with torch.no_grad():
            module(random(7, 128))
        assert "onednn" not in {name for made in choice.choices() for name in made.microseconds}
    finally:
        qlinear_is_exact.cache_clear()


def test_a_choice_is_measured_once_for_all_sites_of_a_shape(monkeypatch):
    only(monkeypatch, "int4pack")
    calls, timed = [], choice.timed
    monkeypatch.setattr(choice, "timed", lambda *args: calls.append(args[0].name) or timed(*args))
    first, second = (layer("int4-g32", dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        first(random(5, 128).bfloat16())
        assert set(calls) == {"int4pack", "decoded", "decode"}
        num_calls = len(calls)
        first(random(8, 128).bfloat16())
        second(random(7, 128).bfloat16())
        assert len(calls) == num_calls, "5 to 8 tokens are taken together"
        second(random(9, 128).bfloat16())
        assert len(calls) > num_calls
    rows = [asdict(each) for each in choices()]
    assert [row["num_tokens"] for row in rows] == [8, 16]
    assert all(set(row["microseconds"]) <= {"int4pack", "decoded", "decode"} for row in rows)
    assert all(row["kernel"] in row["microseconds"] for row in rows)
    assert json.loads(json.dumps(rows))


def test_the_faster_one_is_taken_where_the_difference_is_clear():
    assert choice.fastest({"int8pack": 1.0, "decode": 0.5}) == "decode"
    assert choice.fastest({"int8pack": 1.0, "decode": 0.95}) == "int8pack"
    assert choice.fastest({"int8pack": 0.5, "decode": 1.0}) == "int8pack"


def test_a_kernel_that_strays_or_fails_is_left_out(monkeypatch):
    """Such as one that saturates on a CPU without the right instructions."""
    x = random(4, 128).bfloat16()
    for broken in (lambda x, *rest: torch.zeros(4, 64).bfloat16(), fails):
        kernel = next(kernel for kernel in choice.ROWS if kernel.name == "int8pack")
        wrong = [copy.copy(kernel), choice.DECODE]
        object.__setattr__(wrong[0], "run", broken)
        monkeypatch.setattr(choice, "ROWS", wrong)
        choice.CHOICE.made.clear()
        module = layer("int8", dtype=torch.bfloat16)
        fast, slow = both(module, x)
        assert torch.equal(fast, slow)
        assert kernel_of(module, 4) == "decode"
        assert "int8pack" not in choices()[0].microseconds


def fails(*args):
    raise RuntimeError("not on this CPU")


def test_what_a_kernel_lays_out_counts_as_memory(monkeypatch):
    model = nn.Sequential(layer("int4-g32", dtype=torch.bfloat16))
    before = measure_size(model).num_bytes
    only(monkeypatch, "int4pack")
    with torch.no_grad():
        model(random(1, 128).bfloat16())
    laid_out = 64 * 128 // 2 + 64 * (128 // 32) * 2 * 2  # codes, and pairs of bfloat16
    assert measure_size(model).num_bytes == before + laid_out
    assert not any("memory" in name for name in model.state_dict()), "and is not stored"
    only(monkeypatch, "decode")
    choice.CHOICE.made.clear()
    other = nn.Sequential(layer("int4-g32", dtype=torch.bfloat16))
    with torch.no_grad():
        other(random(1, 128).bfloat16())
    assert measure_size(other).num_bytes == before, "kernels that were not chosen leave nothing behind"


def test_casting_and_moving_forgets_the_choice(monkeypatch):
    only(monkeypatch, "int4pack")
    module = layer("int4-g32", dtype=torch.bfloat16, bias=False)
    with torch.no_grad():
        module(random(1, 128).bfloat16())
        module.float()
        assert not module.packed.memory.layouts
        fast, slow = both(module, random(1, 128))
    assert torch.equal(fast, slow)


def test_a_weight_that_was_trained_is_laid_out_anew(monkeypatch):
    only(monkeypatch, "int4pack")
    module, x = layer("int4-g32", dtype=torch.bfloat16, bias=False), random(2, 128).bfloat16()
    with torch.no_grad():
        before = module(x)
    scale = module.packed._buffers["scale"]
    scale.requires_grad_(True)
    module(x)
    scale.requires_grad_(False)
    scale.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(module(x), 2 * before, rtol=2**-6, atol=2**-6)


def test_gradients_flow_through_a_model_in_bfloat16():
    module, x = layer("int4-g32", dtype=torch.bfloat16), random(2, 128).bfloat16().requires_grad_()
    module(x).float().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


COMPILED = """
import sys, torch
from torch import nn
import tersor
from tersor.kernels import reference

def forward(model, x):
    return model(x)

class Task:
    name, output, description, fingerprint = "toy", "values", "toy", "0"
    prepare = score = None
    batches = lambda self, split, batch_size=None: iter([torch.randn(64, 64)])
    forward = lambda self, model, batch: model(batch)

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(4, 64)
for backend in sys.argv[2:]:
    for scheme in sys.argv[1].split(","):
        for dtype in (torch.float32, torch.bfloat16):
            small = tersor.compress(model, tersor.Recipe.of(scheme), Task()).model.to(dtype)
            torch._dynamo.reset()
            with torch.no_grad():
                made = torch.compile(small, backend=backend, fullgraph=True)(x.to(dtype))
                with reference():
                    expected = small(x.to(dtype))
            room = 0.05 if dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(made, expected, rtol=room, atol=room)
print("all agree")
"""


def compile_all(schemes, *backends):
    """In a process of its own: what checks shapes in tests is no code that Dynamo can follow."""
    command = [sys.executable, "-c", COMPILED, schemes, *backends]
    child = subprocess.run(command, capture_output=True, text=True)
    assert "all agree" in child.stdout, child.stderr


def test_packed_models_compile_whole():
    compile_all("int8-dynamic,int8/int8-static,int4-g32,int8", "aot_eager")


@pytest.mark.slow
def test_packed_models_compile_with_inductor():
    compile_all("int8-dynamic,int8/int8-static,int4-g32", "inductor")


def test_loading_in_bfloat16_runs_on_packed_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64)).eval()
    tersor.save(tersor.compress(model, tersor.Recipe.of("int4-g32")).model, tmp_path)
    only(monkeypatch, "int4pack")
    loaded = tersor.load(tmp_path, model=copy.deepcopy(model), dtype=torch.bfloat16)
    x = random(2, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x.bfloat16()).float(), model(x), rtol=0.2, atol=0.1)
    assert kernel_of(loaded[0], 2) == "int4pack"
    assert loaded[0].bias.dtype is torch.bfloat16
    with pytest.raises(InputError, match=r"torch\.int8 is no floating-point type"):
        tersor.load(tmp_path, model=model, dtype=torch.int8)


def test_kernel_of_names_what_is_not_linear():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.LSTM(8, 8))
    assert [kernel_of(module) for module in model] == ["float"] * 3
    packed = tersor.compress(model, tersor.Recipe.of("int8-dynamic")).model
    assert kernel_of(packed[0]) == "decode"
    assert kernel_of(packed[1]) in ("int_mm", "float")
    with reference():
        assert kernel_of(packed[1]) == "decode"
    assert len(find_sites(packed)) == 4


def test_onednn_is_for_large_weights():
    """A second copy of a small weight gains nothing."""
    encoded = layer("int8", "int8-dynamic").packed.encoded
    assert not ONEDNN.fits(encoded, Activation("int8-dynamic"), torch.float32)


MISALIGNED = """
import sys, torch
from itertools import product
from pathlib import Path
from torch import nn
import tersor
from tersor.core import weights_file as weights
from tersor.kernels import reference

folder, schemes, header = Path(sys.argv[1]), sys.argv[2:], weights.header

def longer_by(offset):
    # Spaces after the JSON, so that the data begin elsewhere.
    def made(*args):
        padded = header(*args)[8:] + b" " * offset
        return len(padded).to_bytes(8, "little") + padded
    return made

def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)).to(dtype).eval()

for source, scheme in product((torch.bfloat16, torch.float32), schemes):
    made = tersor.compress(model(source), tersor.Recipe.of(scheme)).model
    for offset in (0, 1, 3, 8, 16):
        weights.header = longer_by(offset)
        place = folder / f"{source}-{scheme}-{offset}"
        tersor.save(made, place)
        for dtype in (None, torch.bfloat16):
            loaded = tersor.load(place, model=model(source), dtype=dtype)
            for num_tokens in (1, 4, 32):
                at = torch.randn(num_tokens * 64 + 5).to(dtype or source)
                for x in (at[:-5].view(-1, 64), at[5:].view(-1, 64)):
                    with torch.no_grad():
                        with reference():
                            expected = loaded(x)
                        room = 0.05 if x.dtype is torch.bfloat16 else 1e-4
                        torch.testing.assert_close(loaded(x), expected, rtol=room, atol=room)
print("all agree")
"""


def test_parts_that_lie_anywhere_in_a_file_do_not_end_the_process(tmp_path):
    """`torch._weight_int8pack_mm` does, where codes or inputs do not begin at a multiple of 16 bytes."""
    command = [sys.executable, "-c", MISALIGNED, str(tmp_path), "int8", "int8-dynamic", "int4-g32"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "all agree" in child.stdout


def test_a_kernel_only_gets_what_begins_where_it_must(monkeypatch):
    """The last guard: however a part came to lie elsewhere, it is decoded; and what a packed weight is made of is
    copied to where it may lie, and then it is not."""
    only(monkeypatch, "int8pack")
    module, x = layer("int8", dtype=torch.bfloat16), random(4, 128).bfloat16()
    codes = module.packed.encoded.parts["codes"]
    elsewhere = torch.empty(codes.numel() + 3, dtype=torch.int8)[3:].view_as(codes).copy_(codes)
    module.packed._buffers["codes"] = elsewhere
    fast, slow = both(module, x)
    assert torch.equal(fast, slow)
    assert kernel_of(module, 4) == "decode"
    again = nn.Linear(128, 64, bias=False).eval()
    pack_layer(again, PackedLinear, PackedWeight(module.packed.encoded, Fold((64, 128)), torch.bfloat16), None)
    assert again.packed.encoded.parts["codes"].data_ptr() % 64 == 0
    assert torch.equal(again.packed.encoded.parts["codes"], codes)
    assert kernel_of(again, 4) == "int8pack"


STALE = """
import sys
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
lines = ["from typing import NamedTuple", "from tersor.core.compiled import compiled"]
lines += [f"class {name}(NamedTuple):", "    x: int = 1"]
lines += ["@compiled()", "def same(a):", "    return a.x"]
(folder / "stale.py").write_text(chr(10).join(lines))
sys.path.insert(0, str(folder))
import stale
print(stale.same(getattr(stale, name)()))
"""


def test_what_an_older_version_compiled_does_no_harm(tmp_path):
    """numba's files stay when a package is updated, and name its types."""
    for name in ("Old", "New"):
        child = subprocess.run([sys.executable, "-c", STALE, str(tmp_path), name], capture_output=True, text=True)
        assert child.stdout == "1\n", child.stderr
