"""int8 inputs times int8 weights by loops of our own, one row of the table for each instruction of `instructions.py`.

They quantize inputs, multiply, and scale in one go, so that a layer of a few tokens takes little more than its
products. The sums are those of `torch._int_mm`, and so is every bit of the result.

numba compiles them at the first use on a machine, which takes seconds, and keeps them. Layers whose weights are too
few to repay that have other kernels (int8.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.core.threads import shares, spread
from tersor.formats.contract import Encoded
from tersor.formats.overflow import keeps_pair_rule
from tersor.kernels.contract import Kernel, Layout, grid_of
from tersor.kernels.int8 import SMALL, is_int8, offsets

PANEL, STEP = 16, 4  # rows and columns of a weight that lie together
NAMES = ("vpdpbusd", "vpdpbusd256", "vpmaddubsw", "vpmaddwd", "sdot", "widening")  # of instructions, the fastest first


@cache
def instruction_named(name: str) -> Any:
    """An instruction of this processor; None if it has not got it."""
    # numba takes half a second to import.
    from tersor.core.compiled import CAN_COMPILE
    from tersor.kernels.instructions import INSTRUCTIONS, features, name_of

    if not CAN_COMPILE:
        return None
    found = next(each for each in INSTRUCTIONS if name_of(each) == name)
    return found if any(needs <= features() for needs in found.needs) else None


def fits(name: str, encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True if a row of the table is the one for a layer: the fastest that is here, and exact with this weight."""
    if not is_int8(encoded, activation, dtype) or grid_of(encoded).stored.numel() < SMALL:
        return False
    return name == fastest_exact(encoded)


def fastest_exact(encoded: Encoded) -> str:
    """The first instruction of `NAMES` that this processor has, and that multiplies exactly with a weight; an empty
    name where nothing can be compiled (`NUMBA_DISABLE_JIT=1`)."""
    here = (name for name in NAMES if instruction_named(name) is not None)
    return next((name for name in here if name != "vpmaddubsw" or keeps_pair_rule(grid_of(encoded).stored)), "")


def in_panels(codes: Tensor) -> Tensor:
    """Codes `[out, in]` in the order of the loops, `[panel, step, 16 rows, 4 columns]`, with zeros beyond the ends."""
    num_rows, num_columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -num_columns % STEP, 0, -num_rows % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // STEP, STEP).transpose(1, 2).contiguous()


def nothing_to_add(num_rows: int) -> Tensor:
    """A bias for a layer that has none; it changes not even the sign of a zero."""
    return torch.full((num_rows,), -0.0, dtype=torch.float32, device="cpu")


def lay_out(name: str, encoded: Encoded, activation: Activation | None) -> Layout:
    """The weight in panels, a second copy, and the addresses that the loops take."""
    from tersor.kernels.loops import Weight

    instruction, codes = instruction_named(name), grid_of(encoded).stored
    num_rows, num_columns = encoded.shape
    beyond = -num_rows % PANEL
    offset = offsets(encoded, activation).get("offset", torch.zeros(num_rows, dtype=torch.int32, device="cpu"))
    if instruction.unsigned:
        offset = offset + 128 * codes.sum(1, dtype=torch.int32)
    static = activation.params if activation is not None else {}
    tensors = {
        "codes": in_panels(codes),
        "offset": torch.nn.functional.pad(offset, (0, beyond)),
        "scale": torch.nn.functional.pad(grid_of(encoded).scale.float().view(-1), (0, beyond)),
        "nothing": nothing_to_add(num_rows),
        **({"input_scale": static["scale"].float(), "zero_point": static["zero_point"].float()} if static else {}),
    }
    at = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    weight = Weight(
        instruction, at["codes"], at["offset"], at["scale"], num_rows, num_columns,
        at.get("input_scale", 0), at.get("zero_point", 0),
    )  # fmt: skip
    return {**tensors, "weight": weight}


@dataclass(frozen=True)
class Loops:
    """The compiled loops of one kernel: where all work beside PyTorch's own operators is done, and is timed.

    Attributes:
        name: name of the kernel.
        precision: type that is multiplied, `int8` or `fp32`.
    """

    name: str
    precision: str

    def multiply(self, loops: Callable[..., None], x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        """Run loops on float tokens: each thread takes some tokens, or some panels where tokens are few. Threads hold
        the tensors that they are given addresses of."""
        from tersor.kernels.loops import Span

        weight, dtype = layout["weight"], x.dtype
        x = x if dtype is torch.float32 and x.stride(1) == 1 else x.float().contiguous()
        addend = layout["nothing"] if bias is None else bias.float().contiguous()
        num_tokens, num_rows, stride = x.shape[0], weight.num_rows, 4 * x.stride(0)
        y = torch.empty(num_tokens, num_rows, dtype=torch.float32, device="cpu")  # whatever the defaults are
        num_panels = -(-num_rows // PANEL)
        by_token = num_tokens >= num_panels
        parts = shares(num_tokens if by_token else num_panels, num_tokens * num_rows * weight.num_columns)

        def part(first: int, last: int) -> None:
            at, to, from_bias = x.data_ptr(), y.data_ptr(), addend.data_ptr()
            if by_token:
                span = Span(from_bias, 0, to + 4 * num_rows * first, 4 * num_rows, 0, num_panels)
                loops(weight, at + first * stride, stride, last - first, span)
            else:
                loops(weight, at, stride, num_tokens, Span(from_bias, 0, to, 4 * num_rows, first, last))

        spread(part, parts)
        return y if dtype is torch.float32 else y.to(dtype)

    def over_time(self, loops: Callable[[int, int], None], batch: int, work: int) -> None:
        """Run loops over all steps of a batch: each thread takes some examples."""
        spread(loops, shares(batch, work))


def run(
    name: str, x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Quantize, multiply and scale, on as many threads as PyTorch has."""
    from tersor.kernels.loops import dense

    return Loops(name, "int8").multiply(dense, x, layout, bias)


def row(name: str) -> Kernel:
    """The kernel of one instruction."""
    return Kernel(name, partial(fits, name), partial(lay_out, name), partial(run, name), 1e-4)


DOT = [row(name) for name in NAMES]
