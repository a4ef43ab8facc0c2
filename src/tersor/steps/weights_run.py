"""One weights step over a model: every site is looked at, and replaced."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import groupby

from torch import Tensor, nn

from tersor.activations.quantizers import ACTIVATIONS, Activation, IntStatic
from tersor.calibration.blocks import BlockRun, find_blocks, part_of
from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.moments import has_inputs
from tersor.calibration.walk import Around, Chosen, Walk
from tersor.core.errors import TersorError
from tersor.core.progress import Progress
from tersor.formats.contract import Encoded
from tersor.methods.contract import BlockMethod
from tersor.methods.stats import Stats
from tersor.nn.copies import copy_but_sites
from tersor.nn.sites import Site, check_finite, find_sites
from tersor.schemes.scheme import Scheme
from tersor.steps.keep_float import predicted_loss
from tersor.steps.result import check_result
from tersor.steps.site_report import SiteReport
from tersor.steps.weights import WeightsStep, preflight
from tersor.tasks.contract import Task
from tersor.transforms.bias_correction import corrected_bias


class WeightsRun:
    """One weights step over a model, which is changed in place.

    Attributes:
        original: what runs beside the model where a method asks for it; None: a copy is made then. Where it is given,
            the model never lies in memory whole, and the curvature of its loss is not gathered.
        around: entered around the work on each part of the model (see calibration/walk.py).
        reports: what became of each site, by name, in the order of the model.
        notes: what the user should know of some sites, by name.
        predicted: where it is not None, nothing is changed: the loss of each site (keep_float.py) is put here, and what
            it would get into `made`.
    """

    def __init__(
        self,
        model: nn.Module,
        step: WeightsStep,
        task: Task | None,
        stats: Mapping[str, Stats] | None,
        seed: int,
        progress: Progress,
        original: nn.Module | None = None,
        around: Around = nullcontext,
    ):
        self.original, self.around = original, around
        self.model, self.task, self.stats, self.seed, self.progress = model, task, stats or {}, seed, progress
        self.corrects_biases = step.bias_correction
        self.work = {site: scheme for site, scheme in step.assign(find_sites(model)) if scheme is not None}
        self.weights: dict[Site, Tensor] = {}  # as they were, of the sites whose method tunes whole blocks
        self.moments: dict[Site, Stats] = {}  # of the same sites
        self.reports: dict[str, SiteReport] = {}
        self.predicted: dict[str, float] | None = None
        self.made: dict[Site, tuple[Encoded, Activation | None]] = {}
        self.notes: dict[str, str] = {}
        preflight(list(self.work.items()))
        for site in self.work if original is None else ():  # else the weights are not there yet
            site.settle(model)
            check_finite(site, site.matrix(model))

    def run(self) -> None:
        needs = needs_of(self.model, self.work)
        if self.corrects_biases:
            needs |= {"mean"}
        if self.predicted is not None:
            needs |= {"row_weight", "column_weight", "sample"}
        if self.task is not None and not self.stats and needs & CURVATURE and self.original is None:
            self.stats = estimate_fisher(self.model, self.task, seed=self.seed, progress=self.progress)
        if self.task is not None and needs - CURVATURE:
            original = self.original
            if original is None:
                original = copy_but_sites(self.model) if "cross_moment" in needs else self.model
            walk = Walk(self.model, original, self.task, list(self.work), self.visit, needs - CURVATURE, self.refine)
            walk.seed, walk.around = self.seed, self.around
            walk.run()
        else:
            block_names = find_blocks(self.model)
            for part, sites in groupby(self.work, lambda site: part_of(block_names, site.parameter)):
                with self.around(part):
                    for site in sites:
                        chosen = self.visit(site, Stats())
                        if chosen is not None:
                            site.replace(self.model, chosen.encoded, chosen.activation)
        self.progress("compressing", len(self.work), len(self.work))
        self.reports = {site.name: self.reports[site.name] for site in self.work}

    def visit(self, site: Site, moments: Stats) -> Chosen | None:
        """Choose what stands in a site's place; None: it stays."""
        self.progress("compressing", len(self.reports), len(self.work))
        known, scheme = self.stats.get(site.name, Stats()), self.work[site]
        stats = replace(moments, row_weight=known.row_weight, column_weight=known.column_weight)
        weight = site.matrix(self.model)
        if isinstance(scheme.method, BlockMethod):
            self.weights[site], self.moments[site] = weight, stats
        encoded = compress_site(site, weight, scheme, stats)
        activation = None
        if scheme.activation and site.takes_activation(self.model, scheme.activation):
            with named(site):
                activation = Activation(scheme.activation, fitted(scheme, stats))
        self.report(site, encoded, weight, activation, stats)
        if self.predicted is not None:
            self.predicted[site.name] = predicted_loss(weight, encoded, activation, stats)
            self.made[site] = encoded, activation
            return None
        return Chosen(encoded, activation, self.new_bias(site, encoded, weight, stats))

    def new_bias(self, site: Site, encoded: Encoded, weight: Tensor, stats: Stats) -> nn.Parameter | None:
        """The bias that takes back what the new weight does to the mean output; None: it stays."""
        repairs = "cross_moment" in self.work[site].method.needs
        if not self.corrects_biases or stats.mean is None or repairs or len(site.owners) > 1:
            return None
        bias = self.model.get_submodule(site.owners[0].module).bias
        if not isinstance(bias, nn.Parameter):
            return None
        with named(site):
            corrected = corrected_bias(bias.detach(), encoded.decode() - weight, stats.mean)
        return nn.Parameter(corrected, requires_grad=bias.requires_grad)

    def refine(self, run: BlockRun, chosen: dict[Site, Chosen]) -> dict[Site, Chosen]:
        """Let the methods that tune whole blocks choose again, each all its sites at once."""
        better: dict[Site, Chosen] = {}
        for method in {scheme.method: None for site in chosen if (scheme := self.work[site])}:
            if isinstance(method, BlockMethod):
                sites = {site.name: site for site in chosen if self.work[site].method == method}
                weights = {name: self.weights.pop(site) for name, site in sites.items()}
                tuned = method.tune(weights, {name: chosen[site].encoded for name, site in sites.items()}, run)
                for name, site in sites.items():
                    better[site] = chosen[site]._replace(encoded=tuned[name])
                    self.report(site, tuned[name], weights[name], chosen[site].activation, self.moments.pop(site))
        return better

    def report(self, site: Site, encoded: Encoded, weight: Tensor, activation: Activation | None, stats: Stats) -> None:
        """Check what stands in a site's place from now on, and note it."""
        note = check_result(site, self.work[site], encoded, weight, stats)
        if note is not None:
            self.notes[site.name] = note
        self.reports[site.name] = SiteReport.of(site, self.work[site], encoded, activation, weight)


CURVATURE = frozenset({"row_weight", "column_weight"})


def needs_of(model: nn.Module, work: Mapping[Site, Scheme]) -> frozenset[str]:
    """The statistics that the scheme of any site reads."""
    needs: frozenset[str] = frozenset()
    for site, scheme in work.items():
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
    """The static parameters of a site's input."""
    assert scheme.activation is not None
    format = ACTIVATIONS[scheme.activation]
    return format.fit(stats, scheme.observer) if isinstance(format, IntStatic) else format.fit(stats)


def compress_site(site: Site, weight: Tensor, scheme: Scheme, stats: Stats) -> Encoded:
    """One site's weight in its format. Raises what its method raises, naming the site and the way out."""
    check_finite(site, weight)
    with named(site):
        encoded = scheme.method.compress(weight, scheme.format, stats)
    return encoded


@contextmanager
def named(site: Site) -> Iterator[None]:
    """Have what goes wrong inside name the site and the way out."""
    try:
        yield
    except TersorError as problem:
        raise type(problem)(f"{site.name}: {problem}; or exclude it with --exclude '{site.name}'") from None
