"""The base of all visitors of a weights step: the scheme of each site, its statistics, and how it is compressed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from tersor.activations.quantizers import ACTIVATIONS, INT8, Activation, IntStatic
from tersor.calibration.blocks import ReplayableBlock
from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.moments import has_inputs
from tersor.calibration.plan import BlockContext, survey
from tersor.calibration.walk import Chosen, visit_without_data, walk
from tersor.core.errors import TersorError
from tersor.core.progress import Progress, silent
from tersor.formats.contract import Encoded
from tersor.formats.overflow import without_overflow
from tersor.methods.stats import Stats
from tersor.nn.copies import copy_but_sites
from tersor.nn.sites import Site, check_finite, find_sites
from tersor.schemes.assignment import Cpu
from tersor.schemes.scheme import Scheme
from tersor.steps.weights import WeightsStep, preflight
from tersor.tasks.contract import Task

CURVATURE = frozenset({"row_weight", "column_weight"})


@dataclass(frozen=True)
class Calibration:
    """The data and statistics that a weights step may learn from, its seed, and where the model's weights are.

    Attributes:
        task: gives the calibration data; None: there is none.
        stats: statistics that are known already, by site; without them the curvature is estimated where it is read.
        seed: of everything drawn at random.
        original: what runs beside the model where a method asks for it; None: a copy is made then. Where it is given,
            the model never lies in memory whole, and the curvature of its loss is not estimated.
        block_context: brings the weights of one part of the model after the other into memory (calibration/plan.py).
    """

    task: Task | None = None
    stats: Mapping[str, Stats] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = silent
    original: nn.Module | None = None
    block_context: BlockContext | None = None


class CompressedSite(NamedTuple):
    """A site's weight before and after, its input quantizer, and the statistics that both were chosen by."""

    weight: Tensor
    encoded: Encoded
    activation: Activation | None
    stats: Stats


class StepVisitor(ABC):
    """Compresses the sites of a model as a weights step says; what becomes of the results is up to the subclass.

    Attributes:
        schemes: of every site that is compressed.
        num_visited: how many sites have been compressed so far.
    """

    def __init__(self, model: nn.Module, step: WeightsStep, calibration: Calibration):
        self.model, self.calibration, self.stats = model, calibration, calibration.stats
        self.schemes = {site: scheme for site, scheme in step.assign(find_sites(model)) if scheme is not None}
        self.cpu, self.num_visited = step.cpu, 0
        preflight(list(self.schemes.items()))
        for site in self.schemes if calibration.original is None else ():  # else the weights are not there yet
            site.materialize(model)
            check_finite(site, site.matrix(model))

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The statistics that the visitor reads."""

    @abstractmethod
    def visit_site(self, site: Site, stats: Stats) -> Chosen | None:
        """The weight that takes a site's place; None: the site stays as it is."""

    @abstractmethod
    def tune_block(self, block_run: ReplayableBlock, chosen: Mapping[Site, Chosen]) -> dict[Site, Chosen]:
        """Better choices for some sites of a block."""

    def run(self) -> None:
        """Visit every site, with the statistics that its method reads if there is a task."""
        model, calibration, needs = self.model, self.calibration, self.needs
        task, original, seed = calibration.task, calibration.original, calibration.seed
        if task is not None and not self.stats and needs & CURVATURE and original is None:
            self.stats = estimate_fisher(model, task, seed=seed, progress=calibration.progress)
        if task is not None and needs - CURVATURE:
            if original is None and "cross_moment" in needs:
                original = copy_but_sites(model)
            plan = survey(model, task, list(self.schemes), block_context=calibration.block_context)
            walk(plan, self, original, seed)
        else:
            visit_without_data(model, list(self.schemes), self, calibration.block_context)
        calibration.progress("compressing", len(self.schemes), len(self.schemes))

    def compress(self, site: Site, moments: Stats) -> CompressedSite:
        """One site's weight in its format, and its input quantizer."""
        self.calibration.progress("compressing", self.num_visited, len(self.schemes))
        self.num_visited += 1
        known, scheme = self.stats.get(site.name, Stats()), self.schemes[site]
        stats = replace(moments, row_weight=known.row_weight, column_weight=known.column_weight)
        weight = site.matrix(self.model)
        encoded = compress_site(site, weight, within_cpu(self.model, site, scheme, self.cpu), stats)
        activation = None
        if scheme.activation and site.takes_activation(self.model, scheme.activation):
            with named(site):
                activation = Activation(scheme.activation, fitted(scheme, stats))
        return CompressedSite(weight, encoded, activation, stats)


def within_cpu(model: nn.Module, site: Site, scheme: Scheme, cpu: Cpu) -> Scheme:
    """The scheme with a format whose products no kernel of these processors overflows, where inputs are int8 too."""
    activation, neighbours = scheme.activation, site.neighbours(model)
    if cpu == "vnni" or activation not in INT8 or neighbours is None or not site.takes_activation(model, activation):
        return scheme
    return replace(scheme, format=without_overflow(scheme.format, neighbours))


def needs_of(model: nn.Module, schemes: Mapping[Site, Scheme]) -> frozenset[str]:
    """The statistics that the scheme of any site reads."""
    needs: frozenset[str] = frozenset()
    for site, scheme in schemes.items():
        read = scheme.method.needs
        if "second_moment" in read and has_inputs(model, site):
            read -= {"column_weight"}  # which only stands in for it
        needs |= read | input_needs(scheme)
    return needs


def input_needs(scheme: Scheme) -> frozenset[str]:
    """The statistics that quantizing a site's input takes."""
    if scheme.observer is not None:
        return scheme.observer.needs
    return ACTIVATIONS[scheme.activation].needs if scheme.activation else frozenset()


def fitted(scheme: Scheme, stats: Stats) -> dict[str, Tensor]:
    """The static parameters of a site's input quantizer."""
    assert scheme.activation is not None
    format = ACTIVATIONS[scheme.activation]
    return format.fit(stats, scheme.observer) if isinstance(format, IntStatic) else format.fit(stats)


def compress_site(site: Site, weight: Tensor, scheme: Scheme, stats: Stats) -> Encoded:
    """One site's weight in its format. Raises what its method raises, naming the site and the way out."""
    check_finite(site, weight)
    with named(site):
        return scheme.method.compress(weight, scheme.format, stats)


@contextmanager
def named(site: Site) -> Iterator[None]:
    """Have what goes wrong inside name the site and the way out."""
    try:
        yield
    except TersorError as problem:
        raise type(problem)(f"{site.name}: {problem}; or exclude it with --exclude '{site.name}'") from None
