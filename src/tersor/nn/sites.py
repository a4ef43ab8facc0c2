"""Find the weights of a model that can be compressed, and put an Encoded back in their place.

Only this file, `calibration/curvature.py` and `packed.py` know modules; methods and formats see matrices. What differs
between module classes is the table `WEIGHTS`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from tersor.activations.quantizers import ACTIVATIONS, Activation
from tersor.core.errors import FormatError, ModelError, UnknownName
from tersor.formats.contract import Encoded
from tersor.formats.overflow import Neighbours
from tersor.nn.computed import computed, computed_weights, inside, materialize, names_beside, originals
from tersor.nn.fused import leave_fused_path
from tersor.nn.in_place import Packed, own_class
from tersor.nn.packed import (
    Fold,
    PackedConv,
    PackedEmbedding,
    PackedLinear,
    PackedProjection,
    PackedTransposedLinear,
    PackedWeight,
    Simulated,
    pack_layer,
    pack_parameter,
    packed_parameters,
    packed_weight,
)
from tersor.nn.recurrent import PackedRecurrent, pack_recurrent


class WeightRow(NamedTuple):
    """A module class, the parameters of it that are weights (a regular expression), what they are, how they fold."""

    classes: tuple[type[nn.Module], ...]
    names: str
    kind: str
    view: str = "rows"


WEIGHTS = [
    WeightRow((nn.modules.linear.NonDynamicallyQuantizableLinear,), "weight", "attention"),
    WeightRow((nn.Linear,), "weight", "linear"),
    WeightRow((nn.Conv1d, nn.Conv2d, nn.Conv3d), "weight", "conv"),
    WeightRow((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "weight", "conv", "transposed"),
    WeightRow((nn.Embedding, nn.EmbeddingBag), "weight", "embedding"),
    WeightRow((nn.RNNBase, nn.RNNCellBase), r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?", "rnn"),
    WeightRow((nn.MultiheadAttention,), "(in|q|k|v)_proj_weight", "attention"),
]
PACKED_KINDS = [
    (PackedProjection, "attention"),
    (PackedLinear, "linear"),
    (PackedConv, "conv"),
    (PackedEmbedding, "embedding"),
]
SMALLEST_STACK = 16  # a bare 3-D parameter is taken for stacked experts when both matrix sides reach this


class Place(NamedTuple):
    """The place of a weight: the module's path and the parameter's name in it."""

    module: str
    parameter: str


@dataclass(frozen=True)
class Site:
    """One weight that can be compressed, seen as a matrix.

    Attributes:
        name: its place in the model: the parameter's name without a trailing `.weight`.
        kind: `linear`, `conv`, `embedding`, `rnn`, `attention` or `stack`.
        fold: how the weight becomes a matrix `[out, in]`.
        owners: where the weight is used; more than one when it is tied.
        dtype: of the weight as it came.
    """

    name: str
    kind: str
    fold: Fold
    owners: tuple[Place, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.fold.shape

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """The full name of the parameter, as in a state dict."""
        return ".".join(filter(None, self.owners[0]))

    def weight(self, model: nn.Module) -> Tensor:
        """The weight in its own shape: the parameter itself, or decoded from what stands in its place."""
        module = model.get_submodule(self.owners[0].module)
        name = self.owners[0].parameter
        packed = packed_weight(module, name)
        if packed is not None:
            return packed()
        return computed(module, name) if name in computed_weights(module) else getattr(module, name)

    def matrix(self, model: nn.Module) -> Float[Tensor, "out in"]:
        """The weight as a float32 matrix, detached."""
        return self.fold.matrix(self.weight(model).detach()).float().contiguous()

    def originals(self, model: nn.Module) -> list[Tensor]:
        """The tensors that the weight is computed from; none if it is a parameter of its own."""
        return [each for place in self.owners for each in originals(model.get_submodule(place.module), place.parameter)]

    def materialize(self, model: nn.Module) -> None:
        """Make the weight a parameter of its own if it is computed from others (weight norm and its like)."""
        for place in self.owners:
            materialize(model.get_submodule(place.module), place.parameter)

    def takes_activation(self, model: nn.Module, activation: str) -> bool:
        """True if an input quantizer of this format can run here: everywhere the weight is used, it is a plain linear
        map, or a convolution, whose inputs have no tokens to take a dynamic scale from, or in an LSTM or GRU, whose
        inputs calibration does not see."""
        modules = [model.get_submodule(place.module) for place in self.owners]
        if self.kind == "rnn":
            return not ACTIVATIONS[activation].layout and all(map(is_recurrent, modules))
        if self.kind == "conv":
            return bool(ACTIVATIONS[activation].layout) and all(map(is_convolution, modules))
        return self.kind == "linear" and all(is_linear(m) or isinstance(m, PackedLinear) for m in modules)

    def neighbours(self, model: nn.Module) -> Neighbours | None:
        """The columns that 8-bit kernels add in one step (formats/overflow.py); None for a depthwise convolution, whose
        kernels add none."""
        module, shape = model.get_submodule(self.owners[0].module), self.fold.weight_shape
        if self.kind != "conv":
            return Neighbours(self.shape[1])
        if shape[1] == 1 and getattr(module, "groups", 1) == shape[0] > 1:
            return None
        return Neighbours(shape[1], torch.Size(shape[2:]).numel())

    def replace(self, model: nn.Module, encoded: Encoded, activation: Activation | None = None) -> None:
        """Put `encoded` in every place of this weight. Raises FormatError if the shapes differ."""
        if encoded.shape != self.shape:
            raise FormatError(f"{self.name}: encoded as {encoded.shape}, but the model has {self.shape} here")
        packed = PackedWeight(encoded, self.fold, self.dtype)
        if activation is not None and not self.takes_activation(model, activation.format):
            activation = None
        for place in self.owners:
            put(model, place, packed, activation)


def check_finite(site: Site, weight: Float[Tensor, "out in"]) -> None:
    """Raises ModelError where weights are NaN or infinite, and says where the first of them is."""
    finite = torch.isfinite(weight)
    if not finite.all():
        bad = (~finite).nonzero()
        row, column = bad[0].tolist()
        raise ModelError(
            f"{site.name}: {len(bad)} of {weight.numel()} weights are NaN or infinite, the first in row {row}, column "
            f"{column}; retrain or repair it"
        )


def find_sites(model: nn.Module) -> list[Site]:
    """All sites, in the order of the model's modules. Tied weights are one site; a packed model gives the same sites.

    >>> [(site.name, site.shape) for site in find_sites(nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 4)))]
    [('0', (2, 3)), ('1.weight_ih_l0', (16, 2)), ('1.weight_hh_l0', (16, 4))]
    """
    found: dict[int, Site] = {}
    check_has_shapes(model)
    modules = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if not inside(path)]
    weights = {id(module): weights_of(module) for _, module in modules}
    for path, module in modules:
        for parameter, owner, kind, view in weights[id(module)]:
            place = Place(path, parameter)
            if id(owner) in found:
                site = found[id(owner)]
                if place not in site.owners:
                    found[id(owner)] = Site(site.name, site.kind, site.fold, (*site.owners, place), site.dtype)
                continue
            fold = owner.fold if isinstance(owner, PackedWeight) else Fold(tuple(owner.shape), view)
            name = ".".join(filter(None, place)).removesuffix(".weight")
            found[id(owner)] = Site(name, kind, fold, (place,), owner.dtype)
    for path, module in modules:  # ties to modules that the table does not name
        for parameter, owner in owned_by(module).items():
            place = Place(path, parameter)
            if id(owner) in found and place not in found[id(owner)].owners:
                owners = (*found[id(owner)].owners, place)
                found[id(owner)] = replace(found[id(owner)], owners=owners)
    for tensor in from_which_others_are_computed(model):
        found.pop(id(tensor), None)
    return [site for site in found.values() if all(site.shape)]  # there is nothing to compress in a weight of no size


def check_has_shapes(model: nn.Module) -> None:
    """Raises ModelError for layers like nn.LazyLinear that have not seen an input yet."""
    for path, module in model.named_modules():
        if any(isinstance(each, nn.UninitializedParameter) for each in module._parameters.values()):
            raise ModelError(
                f"{path or 'the model'} ({type(module).__name__}) has no shape before its first input; run it once"
            )


def from_which_others_are_computed(model: nn.Module) -> list[Tensor]:
    """The tensors that weights are computed from, wherever else they are used."""
    return [each for m in model.modules() for name in computed_weights(m) for each in originals(m, name)]


def check_has_sites(model: nn.Module) -> None:
    """Raises ModelError for a model without a single site."""
    if not find_sites(model):
        raise ModelError(f"{type(model).__name__} has no weight that tersor can compress; see `tersor inspect MODEL`")


def matches(pattern: str, name: str) -> bool:
    """Shell wildcards; a leading `*.` also matches a name at the top.

    >>> matches("*.embeddings.*", "embeddings.word"), matches("*.word", "embeddings.word"), matches("word", "a.word")
    (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase("." + name, pattern)


def escape(name: str) -> str:
    """A pattern that matches exactly this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def check_patterns(patterns: Iterable[str], sites: Iterable[Site]) -> None:
    """Raises UnknownName for a pattern that matches the name of no site."""
    names = [site.name for site in sites]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise UnknownName("site pattern", pattern, names, see="see `tersor inspect MODEL`")


def owned_by(module: nn.Module) -> dict[str, nn.Parameter | PackedWeight]:
    """The floating-point parameters of a module itself, those it computes, and what stands in the place of some."""
    beside = names_beside(module)
    floats: dict[str, Any] = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point() and name not in beside
    }
    floats |= {name: computed(module, name) for name in computed_weights(module)}
    return {**floats, **simulated_parameters(module), **packed_parameters(module)}


def weights_of(module: nn.Module) -> list[tuple[str, nn.Parameter | PackedWeight, str, str]]:
    """The weights a module owns itself: parameter name, owner, kind, view."""
    for packed_class, kind in PACKED_KINDS:
        if isinstance(module, packed_class):
            packed: PackedWeight = module.packed  # type: ignore[assignment]
            return [("weight", packed, kind, packed.fold.view)]
    owned = owned_by(module)
    row = next((row for row in WEIGHTS if isinstance(module, row.classes)), None)
    if row is None and is_transposed_linear(module):
        row = WeightRow((), "weight", "linear", "transposed")
    if row is not None:
        return [(n, p, row.kind, row.view) for n, p in owned.items() if re.fullmatch(row.names, n)]
    return [(n, p, "stack", "stack") for n, p in owned.items() if is_stack(p)]


def is_stack(owner: nn.Parameter | PackedWeight) -> bool:
    """True if a bare parameter is a stack of matrices, such as the weights of experts."""
    shape = owner.fold.weight_shape if isinstance(owner, PackedWeight) else owner.shape
    return len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= SMALLEST_STACK


def is_transposed_linear(module: nn.Module) -> bool:
    """Hugging Face's Conv1D, a Linear with its weight as [in, out]."""
    kind = type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def runs_as_its_class(module: nn.Module) -> bool:
    """True if nobody gave this one module a forward of its own, or attributes that a packed layer needs."""
    return not module.__dict__.keys() & {"forward", "packed", "input_quantizer"}


def is_plain(module: nn.Module) -> bool:
    """True if a module does what its class does, with parameters of its own: no hooks, no own forward, nothing that
    computes a parameter from others."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return runs_as_its_class(module) and not hooks and not is_parametrized(module)


def is_linear(module: nn.Module) -> bool:
    """True if a module computes exactly `x @ W.T + b`, and may become one that does."""
    return (type(module) is nn.Linear or is_transposed_linear(module)) and runs_as_its_class(module)


def is_convolution(module: nn.Module) -> bool:
    """True if a module is a convolution as PyTorch runs it, packed or not."""
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and runs_as_its_class(module)
    return isinstance(module, PackedConv) or plain


def is_recurrent(module: nn.Module) -> bool:
    """True if a module is an LSTM or GRU as PyTorch runs it, without projections, packed or not."""
    kind = own_class(module)
    return kind in (nn.LSTM, nn.GRU) and not module.proj_size and runs_as_its_class(module)


def simulated_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The float parameters behind weights that are trained as their format will hold them, by name."""
    lists: Any = getattr(module, "parametrizations", {})
    return {name: each.original for name, each in lists.items() if isinstance(each[0], Simulated)}


def put(model: nn.Module, place: Place, packed: PackedWeight, activation: Activation | None) -> None:
    """Make the module at `place` run on `packed`, as its class allows."""
    module = model.get_submodule(place.module)
    materialize(module, place.parameter)
    kind = layer_kind(module)
    if kind is not None:
        pack_layer(module, kind, packed, activation)
    elif isinstance(module, PackedRecurrent) or (activation is not None and is_recurrent(module)):
        pack_recurrent(module, place.parameter, packed, activation)
    else:
        pack_parameter(module, place.parameter, packed)
    leave_fused_path(model)


def layer_kind(module: nn.Module) -> type[Packed] | None:
    """The class that a layer becomes if its forward can be replaced; None for any other module."""
    for kind, _ in PACKED_KINDS:
        if isinstance(module, kind):
            return PackedTransposedLinear if isinstance(module, PackedTransposedLinear) else kind
    if not runs_as_its_class(module):
        return None
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return PackedProjection
    if is_linear(module):
        return PackedTransposedLinear if is_transposed_linear(module) else PackedLinear
    if is_convolution(module):
        return PackedConv
    return PackedEmbedding if type(module) is nn.Embedding and module.max_norm is None else None
