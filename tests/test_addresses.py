"""Kernels that take addresses: what they cannot read goes to the reference, and nothing else is written to."""

import os
import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import tersor
from laws import random
from tersor.core import threads
from tersor.core.errors import InputError
from tersor.kernels import choice, dot, kernel_of, reference
from test_kernels import layer, only

KINDS = [("int8", "int8-dynamic"), ("int8", "int8-static"), ("int4-g64", None)]
SHAPE = (130, 200)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(choice, "CHOICE", choice.KernelChoice())


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def warm(request, monkeypatch):
    """A layer that has chosen its kernel for four tokens, one that takes addresses."""
    module = layer(*request.param, shape=SHAPE)
    name = dot.fastest_exact(module.packed.encoded) if request.param[1] else "unpack"
    only(monkeypatch, name)
    with torch.no_grad():
        module(random(4, SHAPE[1]))
        module(random(4, SHAPE[1]))
    assert kernel_of(module, 4) == name
    assert module.packed.memory.ready
    return module


@torch.no_grad()
def expected(module, x):
    with reference():
        return module(x)


@pytest.mark.parametrize("columns", [1, SHAPE[1] - 1, SHAPE[1] + 1])
@torch.no_grad()
def test_an_input_of_another_width_is_refused(warm, columns):
    """Also after another input was taken: nothing beyond its end is read."""
    other = layer("int8", "int8-dynamic", shape=SHAPE)  # for which nothing is left to measure
    for module in (warm, other):
        with pytest.raises((RuntimeError, TypeCheckError)):  # PyTorch's, or of the types that tests check
            module(random(4, columns))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_default_types_and_devices_change_nothing(warm, dtype):
    """Outputs are always written as float32, in the memory of the CPU."""
    x = random(4, SHAPE[1])
    before = warm(x)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(warm(x), before)
        warm.packed.memory.clear()
        assert torch.equal(warm(x), before)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(warm(x), before)
        warm.packed.memory.clear()
        assert torch.equal(warm(x), before)


@torch.no_grad()
def test_a_bias_of_another_shape_or_device(warm):
    x = random(4, SHAPE[1])
    warm.bias = nn.Parameter(torch.ones(1))
    torch.testing.assert_close(warm(x), expected(warm, x))
    for wrong in (torch.ones(7), torch.ones(SHAPE[0], device="meta")):
        warm.bias = nn.Parameter(wrong)
        with pytest.raises((RuntimeError, TypeCheckError)):
            warm(x)


@torch.no_grad()
def test_views_that_negate_and_subclasses(warm):
    x = random(4, SHAPE[1])
    before = warm(x)

    class Named(torch.Tensor):
        pass

    torch.testing.assert_close(warm(torch._neg_view(-x)), before)
    named = warm(x.as_subclass(Named))
    assert type(named) is Named
    torch.testing.assert_close(named.as_subclass(torch.Tensor), before)


@torch.no_grad()
def test_what_records_operations_sees_them(warm):
    x = random(4, SHAPE[1])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert warm(mode.from_tensor(x)).shape == (4, SHAPE[0])
    with FlopCounterMode(display=False) as counter:
        warm(x)
    assert counter.get_total_flops() == 2 * 4 * SHAPE[0] * SHAPE[1]
    recorded = make_fx(warm)(x)
    other = random(4, SHAPE[1], seed=5)
    torch.testing.assert_close(recorded(other), expected(warm, other))


def test_a_bias_is_trained(warm):
    """Where only the bias is, its gradient is what PyTorch's is, and the result is the same to the bit."""
    x = random(2, 2, SHAPE[1])
    with torch.no_grad():
        same = warm(x)
    y = warm(x)
    assert torch.equal(y, same)
    y.square().sum().backward()
    torch.testing.assert_close(warm.bias.grad, 2 * same.sum((0, 1)))


@torch.no_grad()
def test_other_tensors_in_the_place_of_the_weights_are_laid_out(warm):
    """By `load_state_dict(assign=True)` or `functional_call`, of the weight or of its input's quantizer alone."""
    x = random(4, SHAPE[1])
    before = warm(x)
    state = {name: value.clone() for name, value in warm.state_dict().items()}
    state["packed.scale"] *= 2
    changed = torch.func.functional_call(warm, state, (x,))
    torch.testing.assert_close(changed, 2 * before - warm.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(warm(x), before)
    for name in [name for name in state if name.endswith(".scale")]:
        owner, _, part = name.rpartition(".")
        warm.get_submodule(owner).load_state_dict({part: state[name] * 3}, strict=False, assign=True)
        torch.testing.assert_close(warm(x), expected(warm, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(warm(x), expected(warm, x), rtol=1e-4, atol=1e-4)
    warm.packed.tensors["scale"].data = torch.zeros_like(state["packed.scale"])
    torch.testing.assert_close(warm(x), warm.bias.expand(4, -1))


@torch.no_grad()
def test_autocast_gives_its_type_and_measures_as_ever(warm):
    x, name = random(4, SHAPE[1]), kernel_of(warm, 4)
    before = warm(x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = warm(x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y, before.to(torch.bfloat16))
        assert kernel_of(warm, 4) == name
        warm.packed.memory.clear()
        choice.CHOICE.made.clear()


RECURRENT = [(nn.LSTM, {}), (nn.GRU, {}), (nn.LSTM, {"bidirectional": True, "batch_first": True, "num_layers": 2})]


@pytest.fixture(params=RECURRENT, ids=lambda case: case[0].__name__)
def recurrent(request):
    """An LSTM or GRU in int8, whose steps are one loop."""
    kind, options = request.param
    model = tersor.compress(nn.Sequential(kind(90, 80, **options)), "w8a8").model.eval()
    assert kernel_of(model[0]) == dot.fastest_exact(model[0].packed_weight_hh_l0.encoded)
    return model[0]


def states_of(module, batch, dtype=torch.float32):
    h = random((1 + module.bidirectional) * module.num_layers, batch, 80).to(dtype)
    return (h, h.clone()) if module.mode == "LSTM" else h


def test_defaults_types_and_gradients_of_states(recurrent):
    x = random(3, 3, 90)
    with torch.no_grad():
        before, _ = recurrent(x)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(recurrent(x)[0], before)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert torch.equal(recurrent(x)[0], before)
        for dtype in (torch.float64, torch.bfloat16):
            with pytest.raises(RuntimeError, match="dtype"):
                recurrent(x, states_of(recurrent, 3, dtype))
        with pytest.raises(InputError, match="no steps"):
            recurrent(x[:, :0] if recurrent.batch_first else x[:0])
    given = states_of(recurrent, 3)
    h = given[0] if isinstance(given, tuple) else given
    for name, parameter in recurrent.named_parameters():
        parameter.requires_grad_("bias_hh" in name)
    recurrent(x, given)[0].sum().backward()
    assert all(p.grad is not None for name, p in recurrent.named_parameters() if "bias_hh" in name)
    for parameter in recurrent.parameters():
        parameter.requires_grad_(False)
    h.requires_grad_(True)
    recurrent(x, given)[0].sum().backward()
    assert h.grad.abs().sum() > 0


@torch.no_grad()
def test_recurrent_layers_under_autocast(recurrent):
    """Types are those of PyTorch's layers, and values those without autocast, rounded."""
    steps = pack_sequence([random(n, 90) for n in (4, 2)])
    for x in (random(3, 3, 90), steps):
        batch = 2 if x is steps else 3
        for hx in (None, states_of(recurrent, batch)):
            y, last = recurrent(x, hx)
            with torch.autocast("cpu", torch.bfloat16):
                cast, then = recurrent(x, hx)
            assert cast.data.dtype is torch.bfloat16
            assert torch.equal(cast.data, y.data.to(torch.bfloat16))
            if recurrent.mode == "LSTM":
                assert torch.equal(then[1], last[1])


def test_threads_that_cannot_start(monkeypatch):
    """As when the interpreter shuts down: the work is done all the same."""
    threads.pool.cache_clear()
    threads.pool().shutdown()
    try:
        done = []
        threads.spread(lambda first, last: done.append((first, last)), [(0, 1), (1, 2), (2, 3)])
        assert sorted(done) == [(0, 1), (1, 2), (2, 3)]
    finally:
        threads.pool.cache_clear()


WITHOUT = """
import torch, tersor
from torch import nn
from tersor.kernels import kernel_of, reference
model = nn.Sequential(nn.Linear(200, 130))
lstm = nn.LSTM(80, 80)
x = torch.randn(4, 200)
for scheme in ("w8a8", "w4a16"):
    packed = tersor.compress(model, scheme).model
    with torch.no_grad(), reference():
        slow = packed(x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), slow, rtol=1e-4, atol=1e-4)
    print(kernel_of(packed[0], 4))
packed = tersor.compress(nn.Sequential(lstm), "w8a8").model
with torch.no_grad():
    packed(torch.randn(3, 2, 80))
"""


def test_without_a_compiler():
    """NUMBA_DISABLE_JIT=1 has loops run as Python, for a debugger: layers take what PyTorch has."""
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}
    )
    assert child.returncode == 0, child.stderr
    assert set(child.stdout.split()) <= {"int_mm", "decode", "decoded", "onednn"}


DAMAGED = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
lines = ["from tersor.core.compiled import compiled"]
lines += ["@compiled()", "def lazy(a):", "    return a + 1", "@compiled('int64(int64)')", "def at_once(a):"]
(folder / "damaged.py").write_text(chr(10).join([*lines, "    return a + 2"]))
import os
os.utime(folder / "damaged.py", (1, 1))
sys.path.insert(0, str(folder))
import damaged
if len(sys.argv) > 2:  # the folder is gone, and a file is in its place, where nothing can be kept any more
    import shutil
    shutil.rmtree(folder / "__pycache__")
    (folder / "__pycache__").write_text("")
print(damaged.lazy(1), damaged.at_once(1))
"""


def test_damaged_files_of_compiled_code_do_no_harm(tmp_path):
    """As a full disk or a crash leaves them; or a folder in which nothing can be written when it is time to."""

    def run(*more):
        code = [sys.executable, "-c", DAMAGED, str(tmp_path), *more]
        child = subprocess.run(code, capture_output=True, text=True, env={**os.environ, "NUMBA_CACHE_DIR": ""})
        assert child.stdout == "2 3\n", child.stderr

    run()
    for ending in ("nbc", "nbi"):
        files = list(tmp_path.rglob(f"*.{ending}"))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:40])
        run()
    run("gone")
