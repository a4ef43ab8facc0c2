"""Which weights stay zero: what a pruning step found, held by every step after it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tersor.sites import Site, find_sites


class Held(NamedTuple):
    """A parameter that is trained, and its mask in the parameter's own shape."""

    parameter: nn.Parameter
    mask: Tensor


class Masks:
    """A mask for each pruned site, by its name: bool `[out, in]`, True where the weight is kept.

    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> masks = Masks({"0": torch.tensor([[True, False]])})
    >>> masks.apply(model)
    >>> model[0].weight[0, 1].item()
    0.0
    """

    def __init__(self, masks: dict[str, Bool[Tensor, "out in"]] | None = None):
        self.masks = dict(masks or {})

    def held(self, model: nn.Module) -> list[Held]:
        """The trained parameters behind the masks; those of packed sites are not trained."""
        found = []
        for site in find_sites(model):
            parameter = trained(model, site)
            if site.name in self.masks and parameter is not None:
                mask = site.fold.unfold(self.masks[site.name])
                found.append(Held(parameter, mask.to(parameter.device)))
        return found

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set what the masks drop to zero."""
        for parameter, mask in self.held(model):
            parameter.mul_(mask)

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """From now on a step of the optimizer neither moves what is dropped nor remembers its gradient.

        The masks may change meanwhile; `refresh` says so.
        """
        self.refresh(model)

        def before(*_: object) -> None:
            for parameter, mask in self.current:
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)

        @torch.no_grad()
        def after(*_: object) -> None:
            for parameter, mask in self.current:
                parameter.mul_(mask)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def refresh(self, model: nn.Module) -> None:
        """Take the masks as they are now, and set what they drop to zero."""
        self.current = self.held(model)
        self.apply(model)

    def state(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load(self, state: dict[str, Tensor]) -> None:
        self.masks = {name: mask.bool() for name, mask in state.items()}


def trained(model: nn.Module, site: Site) -> nn.Parameter | None:
    """The parameter whose numbers are trained where a site runs; None where it is packed.

    Under a parametrization (fake quantization) that is the original behind it.
    """
    place = site.places[0]
    module = model.get_submodule(place.module)
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and place.parameter in parametrizations:
        return parametrizations[place.parameter].original
    parameter = module._parameters.get(place.parameter)
    return parameter if isinstance(parameter, nn.Parameter) else None


def zeros_of(model: nn.Module, names: Iterable[str]) -> Masks:
    """The masks that keep what is not zero now."""
    wanted = set(names)
    return Masks({site.name: site.matrix(model) != 0 for site in find_sites(model) if site.name in wanted})
