"""Copies of a model that share the weights of its sites, and their way back to weights of their own."""

import copy

from torch import nn

from tersor.sites import find_sites


def copy_but_sites(model: nn.Module) -> nn.Module:
    """A deep copy that shares the site weights, which are replaced and never written to."""
    weights = [site.weight(model) for site in find_sites(model)]
    return copy.deepcopy(model, {id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)})


def own_shared_weights(model: nn.Module, original: nn.Module) -> None:
    """Copy the site weights that were kept, so that casting or training `model` leaves the original alone."""
    shared = {id(parameter) for parameter in original.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in shared:
                setattr(module, name, copies.setdefault(id(parameter), copy.deepcopy(parameter)))
