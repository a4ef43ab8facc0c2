"""Weights that a module computes from other tensors: weight norm, spectral norm, pruning masks, any parametrization.

PyTorch has two ways to do so. `torch.nn.utils.parametrize` keeps the originals in a ParametrizationList; the older
functions (`weight_norm`, `spectral_norm`, `prune`) keep them beside the weight and compute it in a hook. What a layer
runs on is the computed weight, and that is what is compressed: `materialize` makes it a parameter like any other. The
originals mean something to their function alone, and are never compressed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tersor.nn.packed import Simulated

INSIDE = "parametrizations"
BESIDE = {WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig", "_u", "_v"), prune.BasePruningMethod: ("_orig", "_mask")}
Hook = WeightNorm | SpectralNorm | prune.BasePruningMethod


def computed_weights(module: nn.Module) -> list[str]:
    """The names of the weights that a module computes."""
    lists = module.parametrizations.items() if is_parametrized(module) else ()  # type: ignore[union-attr, operator]
    names = [name for name, each in lists if not isinstance(each[0], Simulated)]
    return [*names, *(name_of(hook) for hook in hooks_of(module))]


def hooks_of(module: nn.Module) -> Iterator[Hook]:
    """The hooks that compute a weight before each forward."""
    yield from (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook))


def name_of(hook: Hook) -> str:
    """The weight that a hook computes."""
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name


def names_beside(module: nn.Module) -> set[str]:
    """The parameters and buffers of a module that its hooks compute weights from."""
    endings = [(hook, ends) for hook in hooks_of(module) for kind, ends in BESIDE.items() if isinstance(hook, kind)]
    return {name_of(hook) + end for hook, ends in endings for end in ends}


def originals(module: nn.Module, name: str) -> list[Tensor]:
    """The tensors that one weight is computed from."""
    if is_parametrized(module, name):
        each: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
        return [*each.parameters(), *each.buffers()]
    tensors = module._parameters | module._buffers
    beside = {beside for beside in names_beside(module) if beside.startswith(f"{name}_")}
    return [tensor for key, tensor in tensors.items() if key in beside and tensor is not None]


def inside(path: str) -> bool:
    """True if a module stands inside a parametrization."""
    return INSIDE in path.split(".")


@torch.no_grad()
def computed(module: nn.Module, name: str) -> Tensor:
    """The weight as the module runs on it in eval mode, without leaving a trace in it."""
    if is_parametrized(module, name):
        each: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
        modes = [(part, part.training) for part in each.modules()]
        each.eval()  # spectral norm goes a step on whenever it is read in training
        value: Tensor = each()
        for part, training in modes:
            part.training = training
        return value
    hook = next(hook for hook in hooks_of(module) if name_of(hook) == name)
    if isinstance(hook, prune.BasePruningMethod):
        return hook.apply_mask(module)
    return hook.compute_weight(module) if isinstance(hook, WeightNorm) else hook.compute_weight(module, False)


@torch.no_grad()
def materialize(module: nn.Module, name: str) -> None:
    """Make a computed weight a parameter of its own; any other stays what it is."""
    if name not in computed_weights(module):
        return
    required = any(tensor.requires_grad for tensor in originals(module, name))
    if is_parametrized(module, name):
        value = computed(module, name).clone()
        leave_parametrization(module, name)
        setattr(module, name, nn.Parameter(value, requires_grad=required))
        return
    for hook in list(hooks_of(module)):
        if name_of(hook) == name:
            remove = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}.get(type(hook), prune.remove)
            remove(module, name)
    module._parameters[name].requires_grad_(required)  # type: ignore[union-attr]


def leave_parametrization(module: nn.Module, name: str) -> None:
    """Have a module no longer compute a weight. PyTorch's own function would take the weight from the class, which the
    module shares with those it was copied from."""
    lists: Any = module.parametrizations
    del lists[name]
    (own,) = type(module).__bases__
    if len(lists):
        kept = {key: value for key, value in vars(type(module)).items() if key not in (name, "__dict__", "__weakref__")}
        own = type(type(module).__name__, (own,), kept)
    else:
        del module._modules[INSIDE]
    module.__class__ = own
