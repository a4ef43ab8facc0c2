"""The one loop: every step of the recipe over every site it names."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tersor.activations import ACTIVATIONS, Activation
from tersor.calibrate import gather
from tersor.errors import FormatError, ModelError, TersorError
from tersor.recipe import Recipe, misfit
from tersor.schemes import Scheme
from tersor.sites import Site, find_sites
from tersor.stats import Stats
from tersor.tasks.contract import Task

Progress = Callable[[str, int, int], None]  # what, done, total


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class SiteReport:
    """What became of one site."""

    name: str
    kind: str
    shape: tuple[int, int]
    scheme: str
    activation: str | None
    num_bytes: int
    bits_per_weight: float
    relative_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Compressed:
    """A compressed model, the recipe that made it, and what became of each site."""

    model: nn.Module
    recipe: Recipe
    sites: list[SiteReport]


def compress(
    model: nn.Module,
    recipe: Recipe,
    task: Task | None = None,
    *,
    stats: Mapping[str, Stats] | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Compress a copy of `model` as the recipe says; the model itself is left as it was.

    Args:
        task: gives calibration data to the methods that ask for statistics; without it they do without.
        stats: statistics already gathered for this model and task.
        progress: called with what is done, how many sites are done, and of how many.

    Raises:
        FormatError: a scheme does not fit a site's shape (before any work starts).
        ModelError: a weight is not finite.
    """
    model_copy = copy_but_sites(model)
    reports: dict[str, SiteReport] = {}
    for step in recipe.steps:
        sites = find_sites(model_copy)
        work = [(site, scheme) for site, scheme in step.assign(sites) if scheme is not None]
        preflight(work)
        if stats is None and task is not None and any(scheme.method.needs for _, scheme in work):
            stats = gather(model, task, seed=recipe.seed, progress=progress)
        for done, (site, scheme) in enumerate(work):
            progress("compressing", done, len(work))
            reports[site.name] = compress_site(model_copy, site, scheme, (stats or {}).get(site.name, Stats()))
        progress("compressing", len(work), len(work))
    own_shared_weights(model_copy, model)
    return Compressed(model_copy, recipe, list(reports.values()))


def compress_site(model: nn.Module, site: Site, scheme: Scheme, stats: Stats) -> SiteReport:
    """Encode one site and put it in its place."""
    weight = site.matrix(model)
    check_finite(site, weight)
    try:
        encoded = scheme.method.compress(weight, scheme.format, stats)
    except TersorError as problem:
        raise type(problem)(f"{site.name}: {problem}; or exclude it with --exclude '{site.name}'") from None
    decoded = encoded.decode()
    if weight.any() and not decoded.any():
        raise FormatError(
            f"{site.name}: {scheme} turns every weight to zero (the largest is {weight.abs().max().item():.2g}, too "
            f"small for fp16 scales or values); use bf16, or exclude it with --exclude '{site.name}'"
        )
    activation = None
    if scheme.activation and site.takes_activation(model):
        activation = Activation(scheme.activation, ACTIVATIONS[scheme.activation].fit(stats))
    error = (decoded - weight).square().sum() / weight.square().sum().clamp_min(1e-38)
    site.replace(model, encoded, activation)
    return SiteReport(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        scheme=str(scheme),
        activation=activation.format if activation else None,
        num_bytes=encoded.num_bytes,
        bits_per_weight=encoded.bits_per_weight,
        relative_error=error.sqrt().item(),
    )


def preflight(work: list[tuple[Site, Scheme]]) -> None:
    """Every shape fits its format, or one message names what does not."""
    problems = [problem for site, scheme in work if (problem := misfit(site, scheme.format))]
    if problems:
        more = f" (and {len(problems) - 1} more sites)" if len(problems) > 1 else ""
        raise FormatError(problems[0] + more)


def check_finite(site: Site, weight: torch.Tensor) -> None:
    """Raises ModelError if a weight is NaN or infinite."""
    num_bad = int((~torch.isfinite(weight)).sum())
    if num_bad:
        raise ModelError(
            f"{site.name}: {num_bad} of {weight.numel()} weights are NaN or infinite; retrain or repair it"
        )


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
