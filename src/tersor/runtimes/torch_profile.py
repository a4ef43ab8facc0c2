"""Profiler of PyTorch models: a stopwatch around every operator that Python calls, by the module that calls it.

Decoding a packed weight and quantizing an input are timed as wholes, wherever they are called from. What a run takes
beyond all of these is Python itself: modules calling each other. It is taken from runs without the stopwatch, in turn
with those that have it, so that the stopwatch's own cost is not in it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.activations.quantizers import ACTIVATIONS
from tersor.formats.contract import Encoded
from tersor.kernels import reference
from tersor.kernels.dot import Loops
from tersor.nn.macs import operation_counter
from tersor.nn.packed import PackedConv, PackedLinear, packed_parameters, packed_weight
from tersor.runtimes.contract import LayerTime, Profile, run_clock

PRODUCTS = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
}
QUANTIZED = {  # by a part of the function's name: what is multiplied
    "_int_mm": "int8",
    "qlinear": "int8",
    "qconv": "int8",
    "linear_dynamic": "int8",
    "weight_int8pack_mm": "",  # by its input's type
    "weight_int4pack_mm": "",
}
QUESTIONS = {
    "__get__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "element_size",
}  # that compute nothing
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


@dataclass(frozen=True)
class OperatorCall:
    """One operator, or one decoding or quantizing as a whole, in a run.

    Attributes:
        module, part: what it served.
        num_bytes: bytes of the tensors that went in and came out, but for what is neither product nor piece.
    """

    module: str
    part: str
    kernel: str
    seconds: float
    num_bytes: int = 0
    precision: str = ""


def profile(model: nn.Module, run: Callable[[], object], num_runs: int) -> Profile:
    """Time `run`, which calls `model`: medians over `num_runs` runs, after two that do not count."""
    run()  # kernels are chosen on the first run
    calls, macs = count_calls(run), macs_by_module(model, run)
    clock, walls = run_clock(torch.get_num_threads()), list[float]()
    runs: list[list[OperatorCall]] = []
    for _ in range(num_runs + 2):
        started = clock()
        run()
        walls.append(clock() - started)
        with Stopwatch(model) as stopwatch:
            run()
        runs.append(stopwatch.calls)
    parts: dict[tuple[str, str], list[OperatorCall]] = defaultdict(list)
    for call in typical(runs[2:]):
        parts[call.module, call.part].append(call)
    modules = dict(model.named_modules())
    layers = [layer_of(found, modules.get(found[0].module), macs) for found in parts.values()]
    return Profile(tuple(layers), median(walls[2:]), calls)


def typical(runs: list[list[OperatorCall]]) -> list[OperatorCall]:
    """The calls of one run, each with its median time over all: a run that waited for other work of the machine did so
    at some of its calls only. Runs that took another way than the last are left out."""
    way = [(call.module, call.part, call.kernel) for call in runs[-1]]
    same = [run for run in runs if [(call.module, call.part, call.kernel) for call in run] == way]
    return [replace(calls[-1], seconds=median(call.seconds for call in calls)) for calls in zip(*same, strict=True)]


def layer_of(calls: list[OperatorCall], module: nn.Module | None, macs: dict[str, int]) -> LayerTime:
    """The time of a layer: all calls of one part of one module, summed."""
    name, part, product = calls[0].module, calls[0].part, calls[0].part == "product"
    by_kernel: dict[str, float] = defaultdict(float)
    for call in calls:
        by_kernel[call.kernel] += call.seconds
    kernel = max(by_kernel, key=by_kernel.__getitem__)
    slowest = next(call for call in calls if call.kernel == kernel)
    decoded = product and isinstance(module, PackedLinear | PackedConv) and slowest.kernel in PRODUCTS
    return LayerTime(
        name=name or "(model)",
        kind=type(module).__name__ if module is not None else "",
        part=part,
        seconds=sum(call.seconds for call in calls),
        kernel=f"{slowest.kernel} on the decoded weight" if decoded else slowest.kernel,
        precision=slowest.precision if product else "",
        weights=stored_as(module) if product else "",
        macs=macs.get(name, 0) if product else 0,
        num_bytes=sum(call.num_bytes for call in calls),
    )


class Stopwatch(TorchFunctionMode):
    """A mode that records the time of every operator and the module that called it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.modules = dict(model.named_modules())
        self.calls: list[OperatorCall] = []
        self.path = [""]
        self.inside, self.in_pieces = False, 0.0
        self.stack = ExitStack()

    def __enter__(self) -> "Stopwatch":
        self.stack.enter_context(removed(register_module_forward_pre_hook(self.enter_module)))
        self.stack.enter_context(removed(register_module_forward_hook(self.leave_module, always_call=True)))
        for owner, name, part in PIECES:
            self.stack.enter_context(replaced(owner, name, self.timed(getattr(owner, name), name, part)))
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self.stack.close()

    def enter_module(self, module: nn.Module, arguments: Any) -> None:
        self.path.append(self.names.get(id(module), self.path[-1]))

    def leave_module(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.path.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator that Python calls, and time it."""
        name = getattr(function, "__name__", str(function))
        if name in QUESTIONS:
            return function(*args, **(kwargs or {}))
        before, started = self.in_pieces, time.perf_counter()
        result = function(*args, **(kwargs or {}))
        seconds = time.perf_counter() - started - (self.in_pieces - before)
        part = self.part_of(name)
        if part == "product":
            moved, precision = bytes_of((args, kwargs, result)), precision_of(name, args)
            self.calls.append(OperatorCall(self.path[-1], part, name, seconds, moved, precision))
        else:
            self.calls.append(OperatorCall(self.path[-1], part, name, seconds))
        return result

    def part_of(self, name: str) -> str:
        """A product by its name; anything else around a kernel for packed weights makes its sums float again."""
        if name in PRODUCTS or any(piece in name for piece in QUANTIZED):
            return "product"
        module = self.modules[self.path[-1]]
        if not isinstance(module, PackedLinear | PackedConv):
            return "other"
        return "quantize" if module.input_quantizer is not None or module.packed.memory.chosen else "other"

    def timed(self, method: Callable[..., Any], name: str, part: str) -> Callable[..., Any]:
        """The method with a stopwatch around it, and none around what it calls."""

        def piece(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return method(*args, **kwargs)
            self.inside, started = True, time.perf_counter()
            try:
                with torch._C.DisableTorchFunction():
                    result = method(*args, **kwargs)
            finally:
                self.inside, seconds = False, time.perf_counter() - started
                self.in_pieces += seconds
            of_loops = args and isinstance(args[0], Loops)
            kernel, precision = (args[0].name, args[0].precision) if of_loops else (name, "")
            self.calls.append(OperatorCall(self.path[-1], part, kernel, seconds, bytes_of((args, result)), precision))
            return result

        return piece


QUANTIZERS = {type(each) for each in ACTIVATIONS.values()}
ROUNDINGS = ("quantize", "fake_quantize")  # their methods that round inputs
PIECES = [
    (Encoded, "decode", "decode"),
    (Encoded, "rows", "decode"),
    *(
        (owner, name, "quantize")
        for owner in QUANTIZERS
        for name in ("quantize", "fake_quantize")
        if hasattr(owner, name)
    ),
    (Loops, "multiply", "product"),
    (Loops, "over_time", "product"),
]


@contextmanager
def replaced(owner: type, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """Context in which a method of a class is replaced by another."""
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Context after which a hook is removed."""
    try:
        yield
    finally:
        handle.remove()


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested arguments; an Encoded counts as it is stored."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Encoded):
        return value.num_bytes
    if isinstance(value, dict):
        return sum(bytes_of(each) for each in value.values())
    return sum(bytes_of(each) for each in value) if isinstance(value, tuple | list) else 0


def precision_of(name: str, args: Any) -> str:
    """The types that a product multiplies."""
    known = next((precision for piece, precision in QUANTIZED.items() if piece in name), "")
    first = next((each for each in args if isinstance(each, Tensor)), None)
    return known or ("" if first is None else PRECISIONS.get(first.dtype, str(first.dtype).removeprefix("torch.")))


def stored_as(module: nn.Module | None) -> str:
    """The format of the weights that a module multiplies itself; empty if it has none."""
    if module is None:
        return ""
    if packed_weight(module, "weight") is not None or packed_parameters(module):
        return "packed"
    return "float" if any(each.ndim > 1 for each in module.parameters(recurse=False)) else ""


def macs_by_module(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Multiply-accumulates of the products that a module calls itself, not through the modules in it."""
    with reference(), operation_counter() as counter:
        run()
    root = type(model).__name__
    counts = {name: sum(each.values()) // 2 for name, each in counter.get_flop_counts().items()}
    whole = {name.removeprefix(root).removeprefix("."): n for name, n in counts.items() if name != "Global"}
    own = dict(whole)
    for name in whole:
        if name:
            own[name.rpartition(".")[0]] = own.get(name.rpartition(".")[0], 0) - whole[name]
    return own


def count_calls(run: Callable[[], object]) -> int:
    """The number of operators that one run starts, those inside decoding and quantizing included."""
    with CallCounter() as counter:
        run()
    return counter.num_calls


class CallCounter(TorchDispatchMode):
    """A dispatch mode that counts operators."""

    num_calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator, and run it."""
        self.num_calls += 1
        return function(*args, **(kwargs or {}))
