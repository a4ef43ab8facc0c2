"""Fake quantization with a learned step size (Esser et al. 2019, LSQ, https://arxiv.org/abs/1902.08153).

Forward, a tensor takes the very values that its format will store: quantized with scales as they are stored, fp16 or
bfloat16, so that nothing changes when the model is packed. Backward, rounding is passed straight through, and

    d quantized / d x      1 where x lies within the range of levels, else 0
    d quantized / d scale  quantized / scale, and -x / scale besides within the range
    d quantized / d zero   -scale outside the range, else 0            (zero points: LSQ+, https://arxiv.org/abs/2004.09576)

Gradients of scales are made smaller by sqrt(n Q), n numbers that share the scale and Q the highest level, which gives
scales and weights relative steps of one size. What is trained is the logarithm of a scale, which keeps its sign, and a
zero point as a fraction of the range: then a step of Adam means the same for every site.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.activations.quantizers import ACTIVATIONS, Activation, IntStatic
from tersor.formats.contract import Encoded, Params, Weight
from tersor.formats.packing import grouped
from tersor.nn.packed import Fold, Simulated, straight_through


@dataclass(frozen=True)
class GridLevels:
    """The grid of a format: values `(code - zero_point) * scale` for whole codes in a range.

    Attributes:
        scale: one number for each group of those that share it; never zero.
        low, high: the ends of the range, as they broadcast against the tensor.
        num_steps: between the ends.
        gather: sums a tensor like the quantized one over those that share a scale.
        slowdown: LSQ's factor of the scales' gradients, 1 / sqrt(n Q).
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    num_steps: float
    gather: Callable[[Tensor], Tensor]
    slowdown: float


class FakeQuantized(torch.autograd.Function):
    """A tensor as its format holds it, with LSQ's gradients for it, the logarithm of its scale, and its zero point."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_scale: Tensor,
        zero_fraction: Tensor | None,
        fake_quantize: Callable[[Tensor], Tensor],
        levels: GridLevels,
    ) -> Tensor:
        quantized = fake_quantize(x)
        ctx.save_for_backward(x, quantized)
        ctx.levels = levels
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, quantized), (gradient,), levels = ctx.saved_tensors, gradients, ctx.levels
        passed = gradient * (x >= levels.low).logical_and_(x <= levels.high)
        # Times the scale: quantized - x within the range, quantized outside.
        by_group = levels.gather((gradient * quantized).addcmul_(passed, x, value=-1))
        of_scale = by_group * levels.slowdown / levels.scale.square()
        of_zero = None
        if ctx.needs_input_grad[2]:
            of_zero = levels.gather(gradient - passed) * -levels.slowdown / (levels.scale * levels.num_steps)
        return passed, of_scale, of_zero, None, None


class FakeWeight(Simulated):
    """The parametrization under which a site's weight is trained.

    Attributes:
        start: the scales as they were chosen before training, float32.
        log_scale: the logarithm of what they are multiplied with.
        zero_fraction: zero points as fractions of the range, for formats that store some.
    """

    start: Tensor
    zero_fraction: nn.Parameter | None

    def __init__(self, encoded: Encoded, fold: Fold):
        super().__init__()
        assert encoded.format.learnable_range is not None
        self.format, self.shape, self.fold = encoded.format, encoded.shape, fold
        self.range = encoded.format.learnable_range
        self.register_buffer("start", encoded.parts["scale"].float(), persistent=False)
        self.log_scale = nn.Parameter(torch.zeros_like(self.start))
        code = encoded.parts.get("zero_point")
        self.register_parameter("zero_fraction", None if code is None else nn.Parameter(code.float() / 256))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in its own shape and type, as it will be decoded."""
        matrix, params = self.fold.matrix(weight).float(), self.params()
        quantized = FakeQuantized.apply(
            matrix,
            self.log_scale,
            self.zero_fraction,
            lambda x: self.format.fake_quantize(x, params),
            self.levels(params),
        )
        return self.fold.unfold(quantized).to(weight.dtype)

    def params(self) -> Params:
        """Scales and zero points as they would be stored now."""
        with torch.no_grad():
            dtype = self.format.layout(self.shape)["scale"][0]
            params = {"scale": (self.start * self.log_scale.exp()).to(dtype)}
            if self.zero_fraction is not None:
                params["zero_point"] = (self.zero_fraction * 256).round().clamp(0, 255).to(torch.uint8)
            return params

    def levels(self, params: Params) -> GridLevels:
        scale = params["scale"].float()
        scale = torch.where(scale == 0, 1.0, scale)
        lowest, highest, num_steps, largest, fixed, _ = self.range
        zero = params["zero_point"].float() * (num_steps / 256) if fixed is None else fixed
        ends = torch.stack([(lowest - zero) * scale, (highest - zero) * scale])
        low, high = self.spread(ends.amin(0)), self.spread(ends.amax(0))
        num_sharing = math.prod(self.shape) / scale.numel()
        return GridLevels(scale, low, high, num_steps, self.gather, 1 / math.sqrt(num_sharing * largest))

    def spread(self, by_group: Float[Tensor, "rows groups"]) -> Tensor:
        """A value for each group, repeated so that it broadcasts against the matrix."""
        group_size = self.range.group_size
        return by_group.repeat_interleave(group_size, 1)[:, : self.shape[1]] if group_size else by_group

    def gather(self, values: Weight) -> Float[Tensor, "rows groups"]:
        by_group = grouped(values, self.range.group_size or self.shape[1]).sum(-1)
        return by_group.sum(0, keepdim=True) if len(self.start) < self.shape[0] else by_group  # one scale for all rows

    def encode(self, weight: Tensor) -> Encoded:
        """The encoded weight that decodes to the result of `forward`."""
        return self.format.encode(self.fold.matrix(weight.detach()).float().contiguous(), self.params())


class FakeInput(nn.Module):
    """The fake quantizer of a site's input while it is trained.

    A static scale is learned; its zero point stays, so that zero stays a level. Dynamic formats have nothing to learn,
    and gradients pass straight through.
    """

    start: Tensor
    zero_point: Tensor | None
    log_scale: nn.Parameter | None

    def __init__(self, activation: Activation):
        super().__init__()
        self.format = activation.format
        scale = activation.params.get("scale")
        self.register_buffer("start", scale, persistent=False)
        self.register_buffer("zero_point", activation.params.get("zero_point"), persistent=False)
        self.register_parameter("log_scale", None if scale is None else nn.Parameter(torch.zeros_like(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """The input as the packed site will see it."""
        activation = self.activation()
        if self.log_scale is None:
            return straight_through(x, activation.fake_quantize(x))
        return FakeQuantized.apply(x, self.log_scale, None, activation.fake_quantize, self.levels(activation, x))

    @torch.no_grad()
    def activation(self) -> Activation:
        """The input quantizer with its parameters rounded as they would be stored now."""
        params: dict[str, Tensor] = {}
        if self.log_scale is not None:
            params["scale"] = self.start * self.log_scale.exp()
        if self.zero_point is not None:
            params["zero_point"] = self.zero_point
        return Activation(self.format, params)

    def levels(self, activation: Activation, x: Tensor) -> GridLevels:
        quantizer, scale = ACTIVATIONS[self.format], activation.params["scale"]
        if isinstance(quantizer, IntStatic):
            zero = activation.params["zero_point"].float()
            low, high, num_steps = quantizer.lowest - zero, quantizer.highest - zero, 2.0**quantizer.bits - 1
        else:
            largest = torch.full_like(scale, torch.finfo(torch.float8_e4m3fn).max)
            low, high, num_steps = -largest, largest, largest.item()
        slowdown = 1 / math.sqrt(max(1, x[:1].numel()) * num_steps)
        return GridLevels(scale, low * scale, high * scale, num_steps, gather_all, slowdown)


def gather_all(values: Tensor) -> Float[Tensor, " one"]:
    """The sum over all elements: of a tensor with one scale for all."""
    return values.float().sum().view(1)
