"""The nn.Modules that run an Encoded. Weights stay packed in memory; what runs equals the decoded weight.

Linear layers, convolutions and embeddings become `PackedLinear`, `PackedConv` and `PackedEmbedding`, with a forward
that knows packed weights. Every other module that owns a weight (LSTM, GRU, multi-head attention, stacked experts,
classes and instances with a forward of their own) runs its own forward, for which `pack_parameter` has the weight
decoded. All of them stay the modules they were (in_place.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.core.memory import aligned
from tersor.formats.contract import Encoded
from tersor.kernels import WeightKernels, again, linear, transformed
from tersor.nn.in_place import Packed, PackedModule, own_class, turn


@dataclass(frozen=True)
class Fold:
    """The reshaping of a weight of any shape into a matrix `[out, in]`, and back.

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


LIKE = "like"  # the name of the empty parameter


class Stored(nn.Module):
    """Tensors that move with the model from device to device, and that no cast of the model ever changes.

    Casting (`half()`, `to(torch.bfloat16)`) only changes `dtype`, the one results are given in. What does not begin
    where kernels want it, as in a file that others have written, is copied. An empty parameter has that type and the
    device, so that code which asks a model's first parameter for them gets an answer.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, aligned(tensor))
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        self.register_parameter(LIKE, nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False))

    @property
    def dtype(self) -> torch.dtype:
        return self._parameters[LIKE].dtype  # type: ignore[union-attr]

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.become_like(self._parameters[LIKE].detach().to(dtype))  # type: ignore[union-attr]

    def become_like(self, empty: Tensor) -> None:
        self._parameters[LIKE] = nn.Parameter(empty, requires_grad=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stored":
        self.become_like(fn(self._parameters[LIKE].detach()))  # type: ignore[union-attr]
        for name, tensor in self.tensors.items():
            self._buffers[name] = tensor.to(self._parameters[LIKE].device)  # type: ignore[union-attr]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + LIKE]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict({**state_dict, prefix + LIKE: self._parameters[LIKE]}, prefix, *rest)


class PackedWeight(Stored):
    """An Encoded as a module. Calling it decodes to the weight's own shape. Tied weights share one PackedWeight."""

    def __init__(self, encoded: Encoded, fold: Fold, dtype: torch.dtype):
        super().__init__(encoded.parts, dtype)
        self.format, self.shape, self.fold = encoded.format, encoded.shape, fold
        self.memory = WeightKernels()
        self.fetch: Callable[[], dict[str, Tensor]] | None = None
        self.fetched_to = torch.device("cpu")

    def leave(self, fetch: Callable[[], dict[str, Tensor]]) -> None:
        """Hold no parts from now on, and fetch them whenever they are needed."""
        self._buffers.clear()
        self.become_like(torch.empty(0, dtype=self.dtype, device=self.fetched_to))
        self.fetch = fetch
        self.memory = WeightKernels(keeps=False)

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self.fetch is None:  # what Stored does; torch.compile cannot follow super() to a property
            return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        return {name: part.to(self.fetched_to) for name, part in self.fetch().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        self.memory = WeightKernels(keeps=self.fetch is None)
        if self.fetch is not None:
            self.become_like(fn(self._parameters[LIKE].detach()))  # type: ignore[union-attr]
            self.fetched_to = self._parameters[LIKE].device  # type: ignore[union-attr]
            return self
        super()._apply(fn, recurse)
        return self

    @property
    def encoded(self) -> Encoded:
        return Encoded(self.format, self.shape, self.tensors)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.memory = WeightKernels()  # it was laid out for other parts

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
        """The fake-quantized input; gradients pass straight through."""
        quantized = self.activation.fake_quantize(x)
        return straight_through(x, quantized) if is_trained(x) else quantized

    def extra_repr(self) -> str:
        return self.format


class Simulated(nn.Module):
    """A parametrization under which a weight is trained as its format will hold it; the weight stays the same site."""


def is_trained(x: Tensor) -> bool:
    """True if gradients may flow back to an input; `torch.func` asks for them without `requires_grad`."""
    return not torch.jit.is_tracing() and (transformed() or (torch.is_grad_enabled() and x.requires_grad))


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, with the gradient of `x` (Bengio et al. 2013, https://arxiv.org/abs/1308.3432)."""
    return quantized.detach() + (x - x.detach())  # exactly `quantized`


class DecodedLinear(torch.autograd.Function):
    """`F.linear` of a packed weight that is not trained: the backward pass decodes it again, so that neither a float
    weight nor the input stays in memory between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.matrix(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        to_x = gradient @ ctx.packed.matrix().to(gradient.dtype)
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


class PackedLinear(Packed):
    """A linear map whose weight is packed and whose input may be quantized."""

    packed: PackedWeight
    bias: nn.Parameter | None
    input_quantizer: InputQuantizer | None
    in_features: int
    out_features: int

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        x, packed = input, self.packed
        quantizer = self.input_quantizer
        y = again(x, self.bias, packed.memory, packed._buffers, {} if quantizer is None else quantizer._buffers)
        if y is not None:
            return y
        trained = is_trained(x)
        activation = quantizer.activation if quantizer is not None else None
        y = linear(x, packed.encoded, activation, self.bias, packed.memory)
        if y is not None:
            return y
        if activation is not None:
            x = straight_through(x, activation.fake_quantize(x)) if trained else activation.fake_quantize(x)
        if trained and not transformed() and not any(part.requires_grad for part in self.packed.tensors.values()):
            return DecodedLinear.apply(x, self.bias, self.packed)
        return F.linear(x, self.packed.matrix(), self.bias)


class PackedTransposedLinear(PackedLinear):
    """Hugging Face's Conv1D, whose weight is `[in, out]`."""

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.packed.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.packed.shape[0]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return super().forward(x)


class PackedProjection(PackedLinear):
    """nn.MultiheadAttention's output projection, which is never called: its weight and bias are read."""


class PackedConv(Packed):
    """Conv1d, Conv2d or Conv3d with a packed weight; its input may be quantized, before it is padded."""

    packed: PackedWeight
    bias: nn.Parameter | None
    input_quantizer: InputQuantizer | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        return self._conv_forward(x, self.packed(), self.bias)


class PackedEmbedding(Packed):
    """An embedding that decodes only the rows it is asked for."""

    packed: PackedWeight
    num_embeddings: int

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        if not 0 < input.numel() < self.num_embeddings or not self.packed.format.rows_independent:
            return F.embedding(input, self.packed())
        return self.packed.rows(input.reshape(-1)).view(*input.shape, -1)


INPUT_NAMES = ("input", "x")  # of the argument of a linear layer or convolution, in PyTorch and in transformers


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input in a layer's call, whether it was given by position or by name."""
    found: Tensor = args[0] if args else next(kwargs[name] for name in INPUT_NAMES if name in kwargs)
    return found


def with_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a layer's call with another input.

    >>> with_input((), {"input": 1}, 2), with_input((1,), {}, 2)
    (((), {'input': 2}), ((2,), {}))
    """
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(name for name in INPUT_NAMES if name in kwargs): x}


LAYER = "packed"  # where a packed layer keeps its one weight
PREFIX = "packed_"  # before the names of weights that other modules keep


def pack_layer(module: nn.Module, kind: type[Packed], packed: PackedWeight, activation: Activation | None) -> None:
    """Have a linear layer, a convolution or an embedding run on a packed weight, as `kind` does."""
    quantizer = InputQuantizer(activation).train(module.training) if activation else None
    turn(module, kind, {"weight": LAYER})
    module._modules[LAYER] = packed.train(module.training)
    if kind is not PackedEmbedding:
        module._modules["input_quantizer"] = quantizer


def pack_parameter(module: nn.Module, name: str, packed: PackedWeight, kind: type[Packed] = PackedModule) -> None:
    """Keep `module.<name>` packed: decoded whenever it is read, and once for the whole of the module's own forward."""
    names = sorted({*packed_parameters(module), name})
    turn(module, kind, {each: PREFIX + each for each in names})
    module._modules[PREFIX + name] = packed.train(module.training)


def packed_parameters(module: nn.Module) -> dict[str, PackedWeight]:
    """The parameters that `pack_parameter` packed, by name."""
    children = module._modules.items()  # named_children() would skip the second name of a tied weight
    packed = {name: child for name, child in children if isinstance(child, PackedWeight)}
    return {name.removeprefix(PREFIX): child for name, child in packed.items() if name.startswith(PREFIX)}


def packed_weight(module: nn.Module, parameter: str) -> PackedWeight | None:
    """The packed weight that replaced a parameter; None if it was not packed."""
    layer = isinstance(module, PackedLinear | PackedConv | PackedEmbedding) and parameter == "weight"
    packed = module._modules.get(LAYER if layer else PREFIX + parameter)
    return packed if isinstance(packed, PackedWeight) else None


def decode_weights(model: nn.Module) -> None:
    """Make every packed weight of a model an ordinary parameter in its place, and leave its inputs float. The modules
    are of the classes they had before; tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in [each for each in model.modules() if isinstance(each, Packed)]:
        children = dict(module.children_of)
        module.__class__ = own_class(module)  # type: ignore[assignment]
        for name, child in children.items():
            packed: Any = module._modules.pop(child)
            if id(packed) not in made:
                weight = packed.fold.unfold(packed.encoded.decode()).to(packed.dtype)
                made[id(packed)] = nn.Parameter(weight, requires_grad=False)
            module.register_parameter(name, made[id(packed)])
        for name in [n for n, c in module._modules.items() if n == "input_quantizer" or isinstance(c, InputQuantizer)]:
            del module._modules[name]
        if isinstance(module, nn.RNNBase):
            del module.__dict__["_flat_weight_refs"]
            module._init_flat_weights()
