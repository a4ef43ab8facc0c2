"""Masks of pruned weights: set by a pruning step, held by every step after it.

`MaskChoice` says which weights are pruned: those of the smallest magnitude (Han et al. 2015,
https://arxiv.org/abs/1506.02626), each site by itself or all sites under one threshold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.formats.semi_structured import SemiStructured
from tersor.nn.sites import Site, check_patterns, find_sites, matches, simulated_parameters
from tersor.steps.preview import Preview, Pruning

Scope = Literal["global", "site"]
Pattern = Literal["unstructured", "2:4", "4:8"]
N_OF_M = {"2:4": SemiStructured(2, 4), "4:8": SemiStructured(4, 8)}
NONE_LEFT = "nothing to prune: exclude matches every site of the model; leave some of them in"
Mask = Bool[Tensor, "out in"]


class Held(NamedTuple):
    """A parameter that is trained, and its mask in the parameter's own shape."""

    parameter: nn.Parameter
    mask: Tensor


class Masks:
    """A mask for each pruned site, by its name: bool `[out, in]`, True where the weight is kept.

    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> masks = Masks({"0": torch.tensor([[True, False]])})
    >>> masks.apply(model)
    >>> (model[0].weight == 0).tolist()
    [[False, True]]
    """

    def __init__(self, masks: dict[str, Mask] | None = None):
        self.masks = dict(masks or {})

    def held(self, model: nn.Module) -> list[Held]:
        """The trained parameters behind the masks; those of packed sites are not trained."""
        places = {site.name: (trained(model, site), site.fold) for site in find_sites(model)}
        found = []
        for name, mask in self.masks.items():
            parameter, fold = places.get(name, (None, None))
            if parameter is not None and fold is not None:
                found.append(Held(parameter, fold.unfold(mask).to(parameter.device)))
        return found

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the weights that the masks drop to zero."""
        for parameter, mask in self.held(model):
            parameter.mul_(mask)

    def enforce(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of the optimizer keep to the masks: dropped weights are not moved, their gradients forgotten.

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
        """Read the masks again after they have changed, and set the weights that they drop to zero."""
        self.current = self.held(model)
        self.apply(model)

    def state(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.bool() for name, mask in state.items()}


def trained(model: nn.Module, site: Site) -> nn.Parameter | None:
    """The parameter whose numbers are trained where a site runs; None where it is packed.

    A weight that is computed from other tensors (weight norm, any parametrization) becomes a parameter here.
    """
    site.materialize(model)
    place = site.owners[0]
    module = model.get_submodule(place.module)
    parameter = {**module._parameters, **simulated_parameters(module)}.get(place.parameter)
    return parameter if isinstance(parameter, nn.Parameter) else None


@dataclass(frozen=True)
class MaskChoice:
    """The choice of the weights that are pruned when the step is done.

    Attributes:
        sparsity: the fraction of the chosen sites' weights that is dropped.
        scope: whether all sites are ranked together (`global`) or each by itself (`site`).
        pattern: `2:4` and `4:8` drop half of every 4 and 8 neighbouring columns, whatever `sparsity` says.
        rules: sites that match a pattern are ranked by themselves, and drop their own fraction; the last rule counts.
        exclude: patterns of sites that are not pruned.
    """

    sparsity: float
    scope: Scope = "global"
    pattern: Pattern = "unstructured"
    rules: Mapping[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    def check(self, preview: Preview) -> None:
        """Note the zeros to come. Raises InputError for a site that will be packed, or where none is left to prune."""
        left = {}
        for site in find_sites(preview.model):
            if any(matches(pattern, site.name) for pattern in self.exclude):
                continue
            preview.check_float(site, "prune before the weights step")
            own = [sparsity for pattern, sparsity in self.rules.items() if matches(pattern, site.name)]
            left[site.name] = Pruning([self.sparsity, *own][-1], N_OF_M.get(self.pattern))
        if not left:
            raise InputError(NONE_LEFT)
        preview.pruned |= left

    def groups(self, model: nn.Module) -> list[tuple[list[Site], float]]:
        """Sites that are ranked together, and the fraction they drop together.

        Raises UnknownName for a pattern no site matches, InputError for a site that is packed, or where none is left.
        """
        sites = find_sites(model)
        check_patterns((*self.rules, *self.exclude), sites)
        together: list[Site] = []
        alone: list[tuple[list[Site], float]] = []
        for site in sites:
            if any(matches(pattern, site.name) for pattern in self.exclude):
                continue
            if trained(model, site) is None:
                raise InputError(
                    f"{site.name} is packed already: prune before the weights step, or leave it out with exclude: "
                    f"['{site.name}']"
                )
            own = [sparsity for pattern, sparsity in self.rules.items() if matches(pattern, site.name)]
            if own:
                alone.append(([site], own[-1]))
            elif self.scope == "site":
                alone.append(([site], self.sparsity))
            else:
                together.append(site)
        groups = [*([(together, self.sparsity)] if together else []), *alone]
        if not groups:
            raise InputError(NONE_LEFT)
        return groups

    @torch.no_grad()
    def tighten(self, model: nn.Module, masks: Masks, so_far: Callable[[float], float] = lambda end: end) -> None:
        """Drop more weights, the smallest of those that are left, and set them to zero.

        Args:
            masks: are changed; what they drop already stays dropped, and counts.
            so_far: the fraction that is dropped by now, of the fraction that is dropped in the end.
        """
        for sites, end in self.groups(model):
            weights = {site.name: site.fold.matrix(trained(model, site).detach()).float() for site in sites}  # type: ignore[union-attr]
            kept = {name: masks.masks.get(name, torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}
            share = so_far(end) / end if end else 0.0
            masks.masks |= largest(weights, kept, share, end, N_OF_M.get(self.pattern))
        masks.refresh(model)


def largest(
    weights: Mapping[str, Float[Tensor, "_ _"]],
    kept: Mapping[str, Bool[Tensor, "_ _"]],
    share: float,
    sparsity: float,
    pattern: SemiStructured | None = None,
) -> dict[str, Bool[Tensor, "_ _"]]:
    """Masks that keep the largest of some matrices' weights, ranked together, and none that is not `kept`.

    Dropped are `share` of those that go in the end: a fraction `sparsity` of all, or what `pattern` drops. Of equal
    weights the first go first.

    >>> weights = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([[0.5, 2.0]])}
    >>> everything = {name: weight > 0 for name, weight in weights.items()}
    >>> largest(weights, everything, 1.0, 0.75)
    {'a': tensor([[ True, False]]), 'b': tensor([[False, False]])}
    """
    scores = {name: torch.where(kept[name].to(weight.device), weight.abs(), -1.0) for name, weight in weights.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    num_dropped = sparsity * len(flat)
    if pattern is not None:
        stay = torch.cat([pattern.choose(score).flatten() for score in scores.values()]) & (flat >= 0)
        flat, num_dropped = flat.masked_fill(stay, torch.inf), float((~stay).sum())
    mask = flat >= 0
    mask[flat.argsort(stable=True)[: round(share * num_dropped)]] = False
    sizes = [score.numel() for score in scores.values()]
    return {n: m.view_as(scores[n]).cpu() for n, m in zip(scores, mask.split(sizes), strict=True)}


def sparsity_of(masks: Masks) -> float:
    """The fraction of the masked sites' weights that is dropped.

    >>> sparsity_of(Masks({"0": torch.tensor([[True, False, False, False]])}))
    0.75
    """
    num_kept = sum(int(mask.sum()) for mask in masks.masks.values())
    return 1 - num_kept / max(1, sum(mask.numel() for mask in masks.masks.values()))


def empty_sites(masks: Masks) -> list[str]:
    """Notes for sites of which nothing is left: through them the model says nothing any more."""
    cure = "use scope: site, a rule of its own, or exclude it"
    return [f"{name}: every weight was pruned; {cure}" for name, mask in masks.masks.items() if not mask.any()]
