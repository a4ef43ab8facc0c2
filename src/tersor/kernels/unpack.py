"""Float inputs times packed integers, by loops of our own that turn codes into floats in registers.

The weight is the decoded one, bit for bit, and nothing of it is kept in float: one token reads a byte or half a byte
for each weight, many tokens decode a panel of 16 rows at a time. Inputs in 16 bits are multiplied in float32, and
results rounded to their type.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.formats.contract import Encoded
from tersor.kernels.contract import Kernel, Layout, grid_of
from tersor.kernels.dot import PANEL, Loops, instruction_named, nothing_to_add
from tersor.kernels.int8 import SMALL


def is_packed(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """Integers with scales, and inputs as they come; weights that repay compiling."""
    grid, plain = encoded.integers, dtype in (torch.float32, torch.bfloat16, torch.float16)
    large = grid is not None and grid.shape[0] * grid.shape[1] >= SMALL
    return activation is None and large and plain and instruction_named("widening") is not None


def lay_out(encoded: Encoded, activation: Activation | None) -> Layout:
    """The codes in panels, a second copy: two in a byte up to 4 bits, one above. And the addresses the loops take."""
    from tersor.kernels.float_loops import PackedPanels
    from tersor.kernels.float_tile import Bits4, Bits8

    grid, (num_rows, num_columns) = grid_of(encoded), encoded.shape
    codes = by_panels(grid.codes)
    if grid.bits <= 4:
        codes = codes[..., : PANEL // 2] | codes[..., PANEL // 2 :] << 4
    tensors = {
        "codes": codes.contiguous(),
        "scale": by_panels(grid.scale.float()).contiguous(),
        "zero": by_panels(grid.zero_points.float()).contiguous(),
        "nothing": nothing_to_add(num_rows),
    }
    at = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    kind = Bits4() if grid.bits <= 4 else Bits8()
    size = grid.group_size or num_columns
    weight = PackedPanels(kind, at["codes"], at["scale"], at["zero"], num_rows, num_columns, size)
    return {**tensors, "weight": weight}


def by_panels(rows: Tensor) -> Tensor:
    """`[out, n]` as `[panel, n, 16]`; the last panel ends in zeros."""
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2)


def run(x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None) -> Tensor:
    """Multiply, on as many threads as PyTorch has."""
    from tersor.kernels.float_loops import unpacked

    return Loops("unpack", "fp32").multiply(unpacked, x, layout, bias)


def always_small(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """True for few weights with inputs as they come."""
    return activation is None and dtype.is_floating_point and 0 < encoded.shape[0] * encoded.shape[1] < SMALL


def decoded_layout(encoded: Encoded, activation: Activation | None) -> dict[str, Any]:
    """The weight in float, kept."""
    return {"weight": encoded.decode()}


def run_kept(x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None) -> Tensor:
    """Multiply with a weight that was decoded once and stays in memory."""
    return F.linear(x, layout["weight"].to(x.dtype), bias)


UNPACK = Kernel("unpack", is_packed, lay_out, run, 1e-4)
KEPT = Kernel("decoded", always_small, decoded_layout, run_kept, 0.0)
