"""The PyTorch operators that stand for a packed module in a traced graph, with its codes and scales.

static      the input quantized and dequantized by its fixed scale, the weight dequantized from signed bytes with a
            scale per output channel: XNNPACK fuses that to an int8 product where the result is quantized as well
            (codes.py sees to it)
dynamic     the same with a scale per token that is taken when the model runs. XNNPACK rounds inputs to int8 with a
            zero point, where ours are symmetric
embedding   rows of codes and their scales are looked up, then multiplied
decoded     a float weight
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.fx import GraphModule

from tersor.exporters.contract import PackedSite

LOWEST, HIGHEST = -128, 127  # codes of inputs; weights are spread evenly around zero
EPS = 1e-12  # the least scale of an input


class Rounding(Enum):
    """The way a file rounds inputs and keeps weights."""

    KERNELS = "as XNNPACK's kernels do, weights as codes"
    ARTIFACT = "exactly as in the artifact, weights decoded"
    NONE = "not at all, weights decoded"


def holds(packed: PackedSite) -> bool:
    """True if the file can keep the site's codes, or its 16-bit floats as 32-bit ones."""
    if packed.is_plain:
        return True
    if packed.site.kind == "embedding":
        shared = len(packed.site.owners) > 1
        return dynamic(packed) if shared else packed.encoded.integers is not None
    return static(packed) or dynamic(packed)


def nearby(packed: PackedSite) -> str:
    """A scheme that the file could hold for this layer."""
    if packed.site.kind in ("linear", "embedding"):
        return "int8"
    return "int8/int8-static" if plain_convolution(packed) else "bf16"


def plain_convolution(packed: PackedSite) -> bool:
    """True if XNNPACK has an int8 kernel for a convolution: of one or two axes, not transposed."""
    fold = packed.site.fold
    return packed.site.kind == "conv" and fold.view == "rows" and len(fold.weight_shape) <= 4


def static(packed: PackedSite) -> bool:
    """True if a linear layer's or convolution's weights are int8 by row, and its inputs by one fixed scale."""
    fixed = packed.activation is not None and packed.activation.format == "int8-static"
    return fixed and (packed.site.kind == "linear" or plain_convolution(packed)) and by_row(packed)


def dynamic(packed: PackedSite) -> bool:
    """True if a linear layer's weights are integers by row, and its inputs are float or quantized when it runs."""
    inputs = packed.activation.format if packed.activation else None
    return packed.site.kind in ("linear", "embedding") and inputs in (None, "int8-dynamic") and by_row(packed)


def by_row(packed: PackedSite) -> bool:
    """True if one scale serves a whole row, and codes are spread evenly around zero."""
    grid = packed.encoded.integers
    return grid is not None and grid.symmetric and grid.scale.shape[1] == 1


def linear(packed: PackedSite, bias: nn.Parameter | None, rounding: Rounding) -> Callable[[Tensor], Tensor]:
    """The function that replaces a linear layer's forward in the trace."""
    made, before = weight(packed, rounding), quantized(packed, rounding)
    if rounding is Rounding.KERNELS and dynamic(packed):
        before = through_dynamic
    return lambda x: F.linear(before(x), made(), bias)


def quantized(packed: PackedSite, rounding: Rounding) -> Callable[[Tensor], Tensor]:
    """The input quantizer of a layer."""
    activation = packed.activation
    if activation is None or rounding is Rounding.NONE:
        return lambda x: x
    if rounding is Rounding.KERNELS and static(packed):
        scale, zero_point = (activation.params[name].item() for name in ("scale", "zero_point"))
        return lambda x: through_static(x, scale, int(zero_point))
    return activation.fake_quantize


def weight(packed: PackedSite, rounding: Rounding) -> Callable[[], Tensor]:
    """The decoding of a weight."""
    if rounding is Rounding.KERNELS and (static(packed) or dynamic(packed)):
        codes, scale = signed_codes(packed)
        shaped, zero_points = packed.site.fold.unfold(codes), torch.zeros(len(scale), dtype=torch.int64)
        settings = (0, -HIGHEST, HIGHEST, torch.int8)
        return lambda: operators().dequantize_per_channel.default(shaped, scale, zero_points, *settings)
    decoded = packed.site.fold.unfold(packed.encoded.decode(torch.float32))
    return lambda: decoded


def embedding(packed: PackedSite, rounding: Rounding) -> Callable[[Tensor], Tensor]:
    """The function that replaces an embedding's forward in the trace."""
    grid, floats = packed.encoded.integers, packed.encoded.floats
    if rounding is Rounding.KERNELS and floats is not None and floats.is_ordinary:
        return lambda index: F.embedding(index, floats.values).to(torch.float32)
    if rounding is not Rounding.KERNELS or grid is None:
        decoded = packed.encoded.decode(torch.float32)
        return lambda index: F.embedding(index, decoded)
    codes, scale, num_columns = grid.signed_codes.to(torch.int8), grid.scale.float(), packed.site.shape[1]
    offset = None if grid.symmetric else grid.zero_points - 2 ** (grid.bits - 1)
    group = torch.arange(num_columns) // (grid.group_size or num_columns)

    def forward(index: Tensor) -> Tensor:
        rows = F.embedding(index, codes).to(torch.float32)
        if offset is not None:
            rows = rows - F.embedding(index, offset).index_select(-1, group)
        return rows * F.embedding(index, scale).index_select(-1, group)

    return forward


def through_static(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Quantize and dequantize `x` by a fixed scale."""
    q = operators()
    settings = (scale, zero_point, LOWEST, HIGHEST, torch.int8)
    return q.dequantize_per_tensor.default(q.quantize_per_tensor.default(x, *settings), *settings)


def through_dynamic(x: Tensor) -> Tensor:
    """Quantized by scales that are found when the model runs: XNNPACK takes one per token."""
    q = operators()
    scale, zero_point = q.choose_qparams.tensor(x, LOWEST, HIGHEST, EPS, torch.int8)
    settings = (scale, zero_point, LOWEST, HIGHEST, torch.int8)
    return q.dequantize_per_tensor.tensor(q.quantize_per_tensor.tensor(x, *settings), *settings)


def signed_codes(packed: PackedSite) -> tuple[Int8[Tensor, "out in"], Float[Tensor, " out"]]:
    """The codes of a symmetric grid around zero, with positive scales, as XNNPACK wants them: where the scale of a row
    is negative, its codes change their sign (-8 becomes 8, which a byte holds)."""
    grid = packed.encoded.integers
    assert grid is not None
    scale = grid.scale.float().flatten()
    codes = grid.signed_codes * torch.where(scale < 0, -1, 1).short().unsqueeze(1) * (scale != 0).short().unsqueeze(1)
    return codes.to(torch.int8), torch.where(scale == 0, 1.0, scale.abs())


def rounded(model: GraphModule) -> int:
    """The number of layers in a traced model whose inputs are rounded by scales found when it runs."""
    return sum(node.target == operators().choose_qparams.tensor for node in model.graph.nodes)


def operators() -> Any:
    """The quantization operators that ExecuTorch knows; importing this module of PyTorch defines them."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed
