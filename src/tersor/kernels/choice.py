"""The choice of the kernel that runs a packed layer, from the table `ROWS` and by measurement."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.core.memory import aligned, is_aligned, lies_here
from tersor.formats.contract import Encoded
from tersor.kernels.bf16 import INT4_PACK, INT8_PACK
from tersor.kernels.contract import Kernel, Layout
from tersor.kernels.decode import DECODE, run_decoded
from tersor.kernels.dot import DOT
from tersor.kernels.int8 import FLOAT, INT_MM, ONEDNN
from tersor.kernels.unpack import KEPT, UNPACK

ROWS = [*DOT, INT_MM, FLOAT, ONEDNN, INT8_PACK, INT4_PACK, UNPACK, KEPT, DECODE]


@contextmanager
def reference() -> Iterator[None]:
    """Context in which every packed layer decodes its weight and computes in float, without kernels."""
    before, CHOICE.enabled = CHOICE.enabled, False
    try:
        yield
    finally:
        CHOICE.enabled = before


@dataclass(frozen=True)
class KernelTiming:
    """The fastest kernel for a shape, and what each took.

    Attributes:
        num_tokens: the largest number of tokens it is for.
        microseconds: the least of a few runs, by kernel; those whose result strayed are left out.
    """

    kernel: str
    format: str
    activation: str | None
    shape: tuple[int, int]
    num_tokens: int
    dtype: str
    num_threads: int
    microseconds: dict[str, float]


Ready = tuple[Callable[[Tensor, Tensor | None], Tensor], tuple[int, int]]


@dataclass
class WeightKernels:
    """The kernels of one packed weight: those that fit an input type, those chosen, and their layouts.

    Attributes:
        keeps: False for a weight that is fetched whenever it is needed, of which no copy may stay.
        ready: what `again` calls, and the shape of the weight, by number of tokens, type and threads.
        seen: the tensors that the layouts were made from, where each lay, and how often it had been written to then.
    """

    keeps: bool = True
    seen: list[tuple[Tensor, int, int]] = field(default_factory=list)
    ready: dict[tuple[int, torch.dtype, int], Ready] = field(default_factory=dict)
    fitting: dict[torch.dtype, list[Kernel]] = field(default_factory=dict)
    chosen: dict[tuple[int, torch.dtype, int], Kernel] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        """A copy begins anew: layouts hold addresses of the memory of the weight that they were made for."""
        return WeightKernels, (self.keeps,)

    @property
    def num_bytes(self) -> int:
        """The bytes of all layouts."""
        tensors = [value for layout in self.layouts.values() for value in layout.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def kernels(self, encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> list[Kernel]:
        """Those that fit; only decoding takes parts from wherever they lie."""
        if not all(lies_here(part) and is_aligned(part) for part in encoded.parts.values()):
            return [DECODE]
        if dtype not in self.fitting:
            rows = ROWS if self.keeps else [INT_MM, DECODE]
            self.fitting[dtype] = [kernel for kernel in rows if kernel.fits(encoded, activation, dtype)] or [DECODE]
        return self.fitting[dtype]

    def is_stale(self, now: Iterable[Tensor | None]) -> bool:
        """True if a layout was made from other tensors than those of now, or one has been written to since."""
        tensors = list(now)
        return bool(self.seen) and (
            len(tensors) != len(self.seen)
            or any(
                tensor is not then or then.data_ptr() != address or written(then) != times
                for tensor, (then, address, times) in zip(tensors, self.seen, strict=True)
            )
        )

    def clear(self) -> None:
        """Forget everything about a weight that has changed or is about to: other codes may need another kernel."""
        for each in (self.ready, self.fitting, self.chosen, self.layouts, self.seen):
            each.clear()

    def refresh(self, encoded: Encoded, activation: Activation | None) -> None:
        """Begin anew where the weight or the scale of its input is another, or has been written to."""
        if self.is_stale(sources(encoded, activation)):
            self.clear()

    def layout(self, kernel: Kernel, encoded: Encoded, activation: Activation | None) -> Layout:
        """The weight in a kernel's layout, converted once and kept."""
        if kernel.name not in self.layouts:
            if self.keeps and not self.seen:
                self.seen += [(each, each.data_ptr(), written(each)) for each in sources(encoded, activation)]
            self.layouts[kernel.name] = kernel.lay_out(encoded, activation)
        return self.layouts[kernel.name]


def sources(encoded: Encoded, activation: Activation | None) -> list[Tensor]:
    """The tensors that a layout is made from."""
    return [*encoded.parts.values(), *(activation.params.values() if activation is not None else ())]


def written(tensor: Tensor) -> int:
    """The number of in-place writes to a tensor; not counted for tensors of `torch.inference_mode`."""
    return 0 if tensor.is_inference() else tensor._version


MOST_BITS = 12  # of a number of tokens: more are taken together
NUM_RUNS = 5
LONG = 0.02  # seconds of a run, where two will do
CLEAR = 0.9  # of the time that the first kernel in the table takes: what another must need at most
FEW = 32  # tokens that a kernel is tried with first
HOPELESS = 4.0  # times as long as the fastest so far: not tried any further


def choices() -> list[KernelTiming]:
    """The choices made in this process, in the order of their first use."""
    return list(CHOICE.made.values())


def fast(x: Tensor, *, compiling: bool = False) -> bool:
    """True if kernels may run on this input: on the CPU, without gradients and outside of `reference()`.

    Also not while PyTorch records or transforms the run, nor while it compiles, unless `compiling` allows that.
    """
    follows = transformed() or (torch.compiler.is_compiling() and not compiling)
    wanted = CHOICE.enabled and not (torch.is_grad_enabled() and x.requires_grad) and not follows
    return wanted and x.device.type == "cpu" and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """True if a tensor has numbers in memory, where kernels read them: subclasses may have shapes alone."""
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def transformed() -> bool:
    """True while `torch.jit.trace`, `torch.func` (grad, vmap) or a dispatch mode (`make_fx`, a FLOP counter) is at
    work: they follow plain operations only."""
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def linear(
    x: Float[Tensor, "*batch in"],
    encoded: Encoded,
    activation: Activation | None,
    bias: Float[Tensor, " out"] | None,
    memory: WeightKernels,
) -> Float[Tensor, "*batch out"] | None:
    """Run a site by the fastest kernel. None where that is decoding: on other devices than the CPU, where gradients
    flow, inside `reference()`, and where nothing else fits or is faster."""
    if torch.is_grad_enabled() and any(part.requires_grad for part in encoded.parts.values()):
        memory.clear()  # the weight is on its way to change
        return None
    if not fast(x, compiling=True) or not x.numel() or encoded.shape[0] == 0:
        return None
    if not x.dim() or x.shape[-1] != encoded.shape[1]:
        return None
    if torch.compiler.is_compiling():
        kernel, tokens = INT_MM, x.reshape(-1, x.shape[-1])
        if not kernel.fits(encoded, activation, x.dtype):
            return None
        y = kernel.run(tokens, encoded, activation, kernel.lay_out(encoded, activation), bias)
        return y.view(*x.shape[:-1], -1)
    if not readable(x, bias, encoded.shape):
        return None
    if torch.is_autocast_enabled("cpu"):  # exact as ever, and the result in the type that others get then
        with torch.autocast("cpu", enabled=False):
            made = linear(x, encoded, activation, bias, memory)
        return made if made is None else made.to(torch.get_autocast_dtype("cpu"))
    memory.refresh(encoded, activation)
    tokens = aligned(x.reshape(-1, x.shape[-1]))
    kernel = CHOICE.choose(tokens, encoded, activation, bias, memory)
    if kernel is DECODE:
        return None
    layout = memory.layout(kernel, encoded, activation)

    def run(tokens: Tensor, bias: Tensor | None) -> Tensor:
        return kernel.run(tokens, encoded, activation, layout, bias)

    if memory.keeps:
        memory.ready[key_of(tokens)] = run, encoded.shape
    y = WithBias.apply(bias, lambda bias: run(tokens, bias)) if is_trained(bias) else run(tokens, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)


class WithBias(torch.autograd.Function):
    """A linear map of which only the bias is trained."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.dtype = bias.dtype
        return run(bias.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.sum(0).to(ctx.dtype), None


def is_trained(bias: Tensor | None) -> bool:
    """True if gradients flow to a bias."""
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()


def readable(x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> bool:
    """True if kernels can read an input and a bias, and these are as long as the weight says: kernels take addresses
    and check nothing. The reference is for all others; it has PyTorch's own rules and messages."""
    if x.shape[-1] != shape[1] or not x.is_floating_point() or not lies_here(x):
        return False
    return bias is None or (tuple(bias.shape) == tuple(shape[:1]) and lies_here(bias))


def again(x: Tensor, bias: Tensor | None, memory: WeightKernels, *now: Mapping[str, Tensor | None]) -> Tensor | None:
    """The output of `linear` by the kernel it chose before for such inputs: a short path for layers called often.

    `now` are the tensors of the weight and of its input's quantizer. None if no kernel was chosen yet, or gradients may
    flow.
    """
    if torch.is_grad_enabled() or not memory.ready or not fast(x) or torch.is_autocast_enabled("cpu") or not x.numel():
        return None
    if not x.dim() or memory.is_stale(chain.from_iterable(tensors.values() for tensors in now)):
        return None
    tokens = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    run, shape = memory.ready.get(key_of(tokens), (None, (0, 0)))
    if run is None or not readable(x, bias, shape):
        return None
    y = run(aligned(tokens), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)


def key_of(tokens: Tensor) -> tuple[int, torch.dtype, int]:
    """Inputs that run by one choice: their number up to the next power of two, their type, and the threads."""
    return min((tokens.shape[0] - 1).bit_length(), MOST_BITS), tokens.dtype, torch.get_num_threads()


@dataclass
class KernelChoice:
    """The kernels chosen in this process.

    Attributes:
        enabled: False inside `reference()`.
        made: the timings, by format, shape, number of tokens, type and threads.
    """

    enabled: bool = True
    made: dict[tuple[Any, ...], KernelTiming] = field(default_factory=dict)

    def choose(
        self,
        tokens: Float[Tensor, "token in"],
        encoded: Encoded,
        activation: Activation | None,
        bias: Float[Tensor, " out"] | None,
        memory: WeightKernels,
    ) -> Kernel:
        """The fastest kernel for this many tokens, measured where it is not known yet."""
        key = key_of(tokens)
        if key in memory.chosen:
            return memory.chosen[key]
        fitting = memory.kernels(encoded, activation, tokens.dtype)
        names = tuple(kernel.name for kernel in fitting)  # weights of one shape may differ in what is exact with them
        whole = (encoded.format.name, activation.format if activation else None, encoded.shape, *key, names)
        if len(fitting) > 1 and whole not in self.made:
            times = measured(fitting, tokens, encoded, activation, bias, memory)
            self.made[whole] = KernelTiming(
                kernel=fastest(times),
                format=encoded.format.name,
                activation=activation.format if activation else None,
                shape=encoded.shape,
                num_tokens=2 ** key[0],
                dtype=str(tokens.dtype).removeprefix("torch."),
                num_threads=key[2],
                microseconds={name: round(1e6 * seconds, 1) for name, seconds in times.items()},
            )
        name = self.made[whole].kernel if whole in self.made else fitting[0].name
        memory.chosen[key] = next(kernel for kernel in fitting if kernel.name == name)
        used = {kernel.name for kernel in memory.chosen.values()}
        memory.layouts = {name: layout for name, layout in memory.layouts.items() if name in used}
        return memory.chosen[key]


CHOICE = KernelChoice()


def measured(
    kernels: list[Kernel],
    tokens: Tensor,
    encoded: Encoded,
    activation: Activation | None,
    bias: Tensor | None,
    memory: WeightKernels,
) -> dict[str, float]:
    """Seconds that each kernel takes. Left out are those that fail, that stray from the reference, or that take far
    longer than another on a few tokens."""
    expected = run_decoded(tokens, encoded, activation, {}, bias).float()
    size = expected.abs().max().item()
    room = 4 * torch.finfo(tokens.dtype).eps * size
    times: dict[str, float] = {}
    least = float("inf")  # on a few tokens
    for kernel in kernels:
        try:
            rest = (encoded, activation, memory.layout(kernel, encoded, activation), bias)
            first = min(timed(kernel, tokens[:FEW], *rest) for _ in range(3))
            if first > HOPELESS * least:
                continue
            y = kernel.run(tokens, *rest)
        except RuntimeError:  # a CPU or a build that lacks it
            continue
        if (y.float() - expected).abs().max().item() > max(room, kernel.rounding * size):
            continue
        least = min(least, first)
        runs = [timed(kernel, tokens, *rest) for _ in range(2)]  # one may be interrupted
        while len(runs) < NUM_RUNS and min(runs) < LONG:
            runs.append(timed(kernel, tokens, *rest))
        times[kernel.name] = min(runs)
    return times or {kernels[-1].name: 0.0}


def timed(
    kernel: Kernel, x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> float:
    """Seconds that one run takes."""
    started = time.perf_counter()
    kernel.run(x, encoded, activation, layout, bias)
    return time.perf_counter() - started


def fastest(times: dict[str, float]) -> str:
    """The first kernel of the table, or one that is clearly faster: noise should not change results."""
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] < CLEAR * times[first] else first


def kernel_of(module: torch.nn.Module, num_tokens: int = 1) -> str:
    """The kernel that a module runs this many tokens with: a name of `ROWS`, or `float` for one that is not packed.

    Measures where nothing is known yet. Convolutions, embeddings and weights inside other modules are decoded.
    """
    packed = getattr(module, "packed", None)
    if packed is None:
        inside = [child for name, child in module.named_children() if name.startswith("packed_")]
        return (getattr(module, "kernel", DECODE.name) if CHOICE.enabled else DECODE.name) if inside else "float"
    if getattr(module, "in_features", None) is None:
        return DECODE.name
    quantizer = getattr(module, "input_quantizer", None)
    activation, encoded = (quantizer.activation if quantizer is not None else None), packed.encoded
    fitting = packed.memory.kernels(encoded, activation, packed.dtype)
    if not CHOICE.enabled or fitting == [DECODE]:
        return DECODE.name
    x = torch.randn(num_tokens, encoded.shape[1], dtype=torch.float32, device="cpu").to(packed.dtype)
    with torch.no_grad():
        return CHOICE.choose(x, encoded, activation, getattr(module, "bias", None), packed.memory).name
