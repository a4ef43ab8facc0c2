"""Packed weights times inputs in bfloat16, for models that run in it. Results are rounded to it, as all others."""

import torch
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.formats.contract import Encoded
from tersor.kernels.contract import Kernel, Layout, grid_of, scaled


def is_int8_in_bf16(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """int8 codes with one scale per row, in a size that the kernel takes."""
    (num_rows, num_columns), grid = encoded.shape, encoded.integers
    whole = num_rows % 16 == 0 and num_columns % 32 == 0
    return grid is not None and grid.plain_int8 and whole and activation is None and dtype is torch.bfloat16


def int8_pack_layout(encoded: Encoded, activation: Activation | None) -> Layout:
    """Scales of one: bfloat16 would round ours, which come after."""
    return {"ones": torch.ones(encoded.shape[0], dtype=torch.bfloat16, device="cpu")}


def run_int8_pack(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply with `torch._weight_int8pack_mm`."""
    grid = grid_of(encoded)
    sums = torch._weight_int8pack_mm(x.contiguous(), grid.stored, layout["ones"])
    return scaled(sums, grid.scale.new_ones(()).float(), grid.scale, bias, x.dtype)


def is_int4_in_bf16(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """4-bit codes in whole groups of a size that the kernel takes."""
    grid = encoded.integers
    if grid is None or grid.bits != 4 or grid.group_size not in (32, 64, 128, 256):
        return False
    return grid.shape[0] % 16 == 0 and grid.whole_groups and activation is None and dtype is torch.bfloat16


def int4_pack_layout(encoded: Encoded, activation: Activation | None) -> Layout:
    """The codes in the kernel's order, a second copy; `value = (code - 8) * scale + zero`, both in bfloat16."""
    grid = grid_of(encoded)
    codes, scale = grid.codes.int(), grid.scale.float()
    pairs = torch.stack([scale, (8 - grid.zero_points) * scale], -1).transpose(0, 1)
    return {
        "codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        "scales": pairs.to(torch.bfloat16).contiguous(),
    }


def run_int4_pack(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply with `torch._weight_int4pack_mm_for_cpu`."""
    size, multiply = grid_of(encoded).group_size, torch.ops.aten._weight_int4pack_mm_for_cpu
    y = multiply(x.contiguous(), layout["codes"], size, layout["scales"])
    return y if bias is None else y + bias


INT8_PACK = Kernel("int8pack", is_int8_in_bf16, int8_pack_layout, run_int8_pack, 2**-5)
INT4_PACK = Kernel("int4pack", is_int4_in_bf16, int4_pack_layout, run_int4_pack, 2**-5)
