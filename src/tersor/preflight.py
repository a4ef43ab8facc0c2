"""What is wrong with a recipe for a model, said before any work starts."""

from torch import nn

from tersor.assignment import Assignment
from tersor.errors import FormatError
from tersor.formats.contract import Format
from tersor.keep_float import check_number
from tersor.recipe import Recipe
from tersor.schemes import Scheme
from tersor.sites import Site, check_patterns, find_sites
from tersor.training import DistilStep, StudentStep, TrainingStep
from tersor.training.student import make_student


def preflight_all(model: nn.Module, recipe: Recipe | None) -> None:
    """Before anything is measured: every pattern matches a site, and every scheme fits its shape."""
    for step in recipe.steps if recipe else ():
        if isinstance(step, StudentStep):
            model = make_student(model, step, weights=False)
        if isinstance(step, DistilStep):
            step.check_teacher()
        if isinstance(step, TrainingStep):
            check_patterns(step.patterns, find_sites(model))
        if isinstance(step, Assignment):
            work = [(site, scheme) for site, scheme in step.assign(find_sites(model)) if scheme is not None]
            preflight(work)
            check_number(getattr(step, "keep_float", "none"), len(work))


def preflight(work: list[tuple[Site, Scheme]]) -> None:
    """Every shape fits its format, or one message names what does not."""
    problems = [problem for site, scheme in work if (problem := misfit(site, scheme.format))]
    if problems:
        more = f" (and {len(problems) - 1} more sites)" if len(problems) > 1 else ""
        raise FormatError(problems[0] + more)


def misfit(site: Site, format: Format) -> str | None:
    """Why a format cannot hold a site, in one line with the way out."""
    problem = format.misfit(site.shape)
    if not site.places[0].module and site.kind in ("linear", "conv", "embedding"):
        return f"{site.name}: the model is a single layer; wrap it in nn.Sequential so that its weight can be replaced"
    return problem and f"{format.name}: {site.name} {problem}, or exclude it with --exclude '{site.name}'"
