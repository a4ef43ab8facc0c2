"""The nn.Modules that run an Encoded. Weights stay packed in memory; what runs equals the decoded weight.

`PackedLinear`, `PackedConv` and `PackedEmbedding` take the place of their float counterparts. Every other module that
owns a weight (LSTM, GRU, multi-head attention, stacked experts, subclasses with a forward of their own) stays what it
is, and `pack_parameter` has the weight decoded just before the module runs and dropped right after.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tersor.activations import Activation
from tersor.core.memory import aligned
from tersor.formats.contract import Encoded
from tersor.kernels import Memory, linear


@dataclass(frozen=True)
class Fold:
    """How a weight of any shape is seen as a matrix `[out, in]`, and back.

    `rows`: the first axis is out, the rest is in. `transposed`: the first two axes are swapped before that (Hugging
    Face's Conv1D, transposed convolutions). `stack`: the last axis is in, the rest is out (stacked experts).

    >>> fold = Fold((3, 4, 2, 2), "transposed")
    >>> fold.shape, fold.unfold(fold.matrix(torch.zeros(3, 4, 2, 2))).shape
    ((4, 12), torch.Size([3, 4, 2, 2]))
    """

    weight_shape: tuple[int, ...]
    view: str = "rows"

    @property
    def shape(self) -> tuple[int, int]:
        first, *rest = self.swapped_shape
        if self.view == "stack":
            return (torch.Size(self.weight_shape[:-1]).numel(), self.weight_shape[-1])
        return (first, torch.Size(rest).numel())

    @property
    def swapped_shape(self) -> tuple[int, ...]:
        if self.view != "transposed":
            return self.weight_shape
        first, second, *rest = self.weight_shape
        return (second, first, *rest)

    def matrix(self, weight: Tensor) -> Float[Tensor, "out in"]:
        return (weight.transpose(0, 1) if self.view == "transposed" else weight).reshape(self.shape)

    def unfold(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        weight = matrix.reshape(self.swapped_shape)
        return weight.transpose(0, 1).contiguous() if self.view == "transposed" else weight


class Stored(nn.Module):
    """Tensors that move with the model from device to device, and that no cast of the model ever changes.

    Casting (`half()`, `to(torch.bfloat16)`) only changes `dtype`, the one results are given in. What does not begin
    where kernels want it, as in a file that others have written, is copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        for name, tensor in tensors.items():
            self.register_buffer(name, aligned(tensor))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stored":
        for name, tensor in self.tensors.items():
            probe = fn(torch.empty(0, dtype=self.dtype, device=tensor.device))
            self._buffers[name] = tensor.to(probe.device)
            self.dtype = probe.dtype
        return self


class PackedWeight(Stored):
    """An Encoded as a module. Calling it decodes to the weight's own shape. Tied weights share one PackedWeight."""

    def __init__(self, encoded: Encoded, fold: Fold, dtype: torch.dtype):
        super().__init__(encoded.parts, dtype)
        self.format, self.shape, self.fold = encoded.format, encoded.shape, fold
        self.memory = Memory()
        self.fetch: Callable[[], dict[str, Tensor]] | None = None
        self.fetched_to = torch.device("cpu")

    def leave(self, fetch: Callable[[], dict[str, Tensor]]) -> None:
        """Hold no parts from now on, and fetch them whenever they are needed."""
        self._buffers.clear()
        self.fetch = fetch

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self.fetch is None:  # what Stored does; torch.compile cannot follow super() to a property
            return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        return {name: part.to(self.fetched_to) for name, part in self.fetch().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        self.memory = Memory()
        if self.fetch is not None:
            probe = fn(torch.empty(0, dtype=self.dtype, device=self.fetched_to))
            self.dtype, self.fetched_to = probe.dtype, probe.device
            return self
        super()._apply(fn, recurse)
        return self

    @property
    def encoded(self) -> Encoded:
        return Encoded(self.format, self.shape, self.tensors)

    def forward(self) -> Tensor:
        return self.fold.unfold(self.encoded.decode(self.dtype))

    def matrix(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix, in the dtype results are given in."""
        return self.encoded.decode(self.dtype)

    def rows(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        return self.encoded.rows(index).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, shape={tuple(self.shape)}"


class InputQuantizer(Stored):
    """An Activation as a module; its static parameters are kept beside the weight they serve."""

    def __init__(self, activation: Activation):
        super().__init__(activation.params, torch.float32)
        self.format = activation.format

    @property
    def activation(self) -> Activation:
        return Activation(self.format, self.tensors)

    def forward(self, x: Tensor) -> Tensor:
        """The input as its format holds it; gradients pass straight through."""
        snapped = self.activation.snap(x)
        return straight_through(x, snapped) if torch.is_grad_enabled() and x.requires_grad else snapped

    def extra_repr(self) -> str:
        return self.format


class Simulated(nn.Module):
    """A parametrization under which a weight is trained as its format will hold it; the weight stays the same site."""


def straight_through(x: Tensor, snapped: Tensor) -> Tensor:
    """`snapped`, with the gradient of `x` (Bengio et al. 2013, https://arxiv.org/abs/1308.3432)."""
    return snapped.detach() + (x - x.detach())  # exactly `snapped`


class DecodedLinear(torch.autograd.Function):
    """`F.linear` of a packed weight that is not trained: the backward pass decodes it again, so that neither a float
    weight nor the input stays in memory between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.matrix(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        to_x = gradient @ ctx.packed.matrix().to(gradient.dtype)
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


class PackedLinear(nn.Module):
    """A linear map whose weight is packed and whose input may be quantized."""

    bias: nn.Parameter | None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, activation: Activation | None):
        super().__init__()
        self.packed = packed
        self.register_parameter("bias", bias)
        self.input_quantizer = InputQuantizer(activation) if activation else None
        self.out_features, self.in_features = packed.shape

    @property
    def weight(self) -> Tensor:
        return self.packed()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        trained = torch.is_grad_enabled() and x.requires_grad
        activation = self.input_quantizer.activation if self.input_quantizer is not None else None
        y = linear(x, self.packed.encoded, activation, self.bias, self.packed.memory)
        if y is not None:
            return y
        if activation is not None:
            x = straight_through(x, activation.snap(x)) if trained else activation.snap(x)
        if trained and not any(part.requires_grad for part in self.packed.tensors.values()):
            return DecodedLinear.apply(x, self.bias, self.packed)
        return F.linear(x, self.packed.matrix(), self.bias)


class PackedConv(nn.Module):
    """Conv1d, Conv2d or Conv3d with a packed weight; its input may be quantized, before it is padded."""

    bias: nn.Parameter | None

    def __init__(
        self, packed: PackedWeight, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, activation: Activation | None = None
    ):
        super().__init__()
        self.packed = packed
        self.input_quantizer = InputQuantizer(activation) if activation else None
        self.register_parameter("bias", conv.bias)  # type: ignore[arg-type]
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._reversed_padding_repeated_twice: list[int] = conv._reversed_padding_repeated_twice
        self.convolve: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(conv.kernel_size)]

    @property
    def weight(self) -> Tensor:
        return self.packed()

    def forward(self, x: Tensor) -> Tensor:
        padding: object = self.padding
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self.convolve(x, self.packed(), self.bias, self.stride, padding, self.dilation, self.groups)


class PackedEmbedding(nn.Module):
    """An embedding that decodes only the rows it is asked for."""

    def __init__(self, packed: PackedWeight, padding_idx: int | None):
        super().__init__()
        self.packed = packed
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = packed.shape

    @property
    def weight(self) -> Tensor:
        return self.packed()

    def forward(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        if not 0 < index.numel() < self.num_embeddings or not self.packed.format.rows_apart:
            return F.embedding(index, self.packed())
        return self.packed.rows(index.reshape(-1)).view(*index.shape, -1)


class PackedProjection(PackedLinear):
    """nn.MultiheadAttention's output projection, which is never called: its weight and bias are read."""


PREFIX = "packed_"


def pack_parameter(module: nn.Module, name: str, packed: PackedWeight) -> None:
    """Keep `module.<name>` packed: decoded just before the module's forward, dropped right after."""
    if not packed_parameters(module):
        module.register_forward_pre_hook(_decode_parameters)
        module.register_forward_hook(_drop_parameters, always_call=True)
    module._parameters.pop(name, None)
    setattr(module, name, None)
    setattr(module, PREFIX + name, packed.train(module.training))


def packed_parameters(module: nn.Module) -> dict[str, PackedWeight]:
    """The parameters that `pack_parameter` packed, by name."""
    children = module._modules.items()  # named_children() would skip the second name of a tied weight
    packed = {name: child for name, child in children if isinstance(child, PackedWeight)}
    return {name.removeprefix(PREFIX): child for name, child in packed.items() if name.startswith(PREFIX)}


def _decode_parameters(module: nn.Module, args: object) -> None:
    for name, packed in packed_parameters(module).items():
        setattr(module, name, packed())


def _drop_parameters(module: nn.Module, args: object, output: object) -> None:
    for name in packed_parameters(module):
        setattr(module, name, None)
