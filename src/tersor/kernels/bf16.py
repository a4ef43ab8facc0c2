"""Packed weights times inputs in bfloat16, for models that run in it. Results are rounded to it, as all others."""

import torch
from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.formats.contract import Encoded
from tersor.formats.int_group import IntGroup
from tersor.formats.packing import unpack
from tersor.kernels.contract import Kernel, Layout, scaled


def is_int8_in_bf16(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """int8 codes with one scale per row, in a size that the kernel takes."""
    num_rows, num_columns = encoded.shape
    whole = num_rows % 16 == 0 and num_columns % 32 == 0
    plain = isinstance(encoded.format, IntGroup) and encoded.format.plain_int8
    return plain and whole and activation is None and dtype is torch.bfloat16


def int8_pack_layout(encoded: Encoded, activation: Activation | None) -> Layout:
    """Scales of one: bfloat16 would round ours, which come after."""
    return {"ones": torch.ones(encoded.shape[0], dtype=torch.bfloat16)}


def run_int8_pack(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply with `torch._weight_int8pack_mm`."""
    sums = torch._weight_int8pack_mm(x.contiguous(), encoded.parts["codes"], layout["ones"])
    return scaled(sums, encoded.parts["scale"].new_ones(()).float(), encoded, bias, x.dtype)


def is_int4_in_bf16(encoded: Encoded, activation: Activation | None, dtype: torch.dtype) -> bool:
    """4-bit codes in whole groups of a size that the kernel takes."""
    format, (num_rows, num_columns) = encoded.format, encoded.shape
    if not isinstance(format, IntGroup) or format.bits != 4 or format.group_size not in (32, 64, 128, 256):
        return False
    whole = num_rows % 16 == 0 and num_columns % format.group_size == 0
    return whole and activation is None and dtype is torch.bfloat16


def int4_pack_layout(encoded: Encoded, activation: Activation | None) -> Layout:
    """The codes in the kernel's order, a second copy; `value = (code - 8) * scale + zero`, both in bfloat16."""
    format = encoded.format
    assert isinstance(format, IntGroup)
    codes = unpack(encoded.parts["codes"], 4, encoded.shape[1]).int()
    scale, zero_point = encoded.parts["scale"].float(), format.zero_point(encoded.parts)
    zero_point = zero_point.squeeze(-1) if isinstance(zero_point, Tensor) else zero_point
    pairs = torch.stack([scale, (8 - zero_point) * scale], -1).transpose(0, 1)
    return {
        "codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        "scales": pairs.to(torch.bfloat16).contiguous(),
    }


def run_int4_pack(
    x: Tensor, encoded: Encoded, activation: Activation | None, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Multiply with `torch._weight_int4pack_mm_for_cpu`."""
    assert isinstance(encoded.format, IntGroup)
    size, multiply = encoded.format.group_size, torch.ops.aten._weight_int4pack_mm_for_cpu
    y = multiply(x.contiguous(), layout["codes"], size, layout["scales"])
    return y if bias is None else y + bias


INT8_PACK = Kernel("int8pack", is_int8_in_bf16, int8_pack_layout, run_int8_pack, 2**-5)
INT4_PACK = Kernel("int4pack", is_int4_in_bf16, int4_pack_layout, run_int4_pack, 2**-5)
