"""What is wrong with a recipe for a model, said before any work starts."""

from torch import nn

from tersor.assignment import Assignment
from tersor.keep_float import check_number
from tersor.recipe import Recipe
from tersor.sites import check_patterns, find_sites
from tersor.steps.weights import preflight
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
