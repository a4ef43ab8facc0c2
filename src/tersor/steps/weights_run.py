"""One weights step over a model: every site is visited, and a packed weight takes its place."""

from collections.abc import Mapping

from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.calibration.blocks import ReplayableBlock
from tersor.calibration.walk import Chosen
from tersor.formats.contract import Encoded
from tersor.methods.contract import BlockMethod
from tersor.methods.stats import Stats
from tersor.nn.sites import Site
from tersor.steps.result import check_result
from tersor.steps.site_report import SiteReport
from tersor.steps.step_visitor import Calibration, CompressedSite, StepVisitor, named, needs_of
from tersor.steps.weights import WeightsStep
from tersor.transforms.bias_correction import corrected_bias


class WeightsRun(StepVisitor):
    """One weights step over a model, which is changed in place.

    Attributes:
        by_site: what became of each site that was visited.
        notes: what the user should know of some sites, by name.
        tunable: sites whose method chooses again when their block is done, as `compress` found them.
    """

    def __init__(self, model: nn.Module, step: WeightsStep, calibration: Calibration = Calibration()):
        super().__init__(model, step, calibration)
        self.corrects_biases = step.bias_correction
        self.tunable: dict[Site, CompressedSite] = {}
        self.notes: dict[str, str] = {}
        self.by_site: dict[Site, SiteReport] = {}

    @property
    def reports(self) -> dict[str, SiteReport]:
        """A report of each site, by name, in the order of the model."""
        return {site.name: self.by_site[site] for site in self.schemes if site in self.by_site}

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the methods read, and the means of the inputs where biases are corrected."""
        return needs_of(self.model, self.schemes) | (frozenset({"mean"}) if self.corrects_biases else frozenset())

    def visit_site(self, site: Site, stats: Stats) -> Chosen:
        """The packed weight of a site."""
        made = self.compress(site, stats)
        if isinstance(self.schemes[site].method, BlockMethod):
            self.tunable[site] = made
        self.report(site, made.encoded, made.weight, made.activation, made.stats)
        return Chosen(made.encoded, made.activation, self.new_bias(site, made))

    def new_bias(self, site: Site, made: CompressedSite) -> nn.Parameter | None:
        """The bias that takes back what the new weight does to the mean output; None: it stays."""
        repairs = "cross_moment" in self.schemes[site].method.needs
        if not self.corrects_biases or made.stats.mean is None or repairs or len(site.owners) > 1:
            return None
        bias = self.model.get_submodule(site.owners[0].module).bias
        if not isinstance(bias, nn.Parameter):
            return None
        with named(site):
            corrected = corrected_bias(bias.detach(), made.encoded.decode() - made.weight, made.stats.mean)
        return nn.Parameter(corrected, requires_grad=bias.requires_grad)

    def tune_block(self, block_run: ReplayableBlock, chosen: Mapping[Site, Chosen]) -> dict[Site, Chosen]:
        """Let the methods that tune whole blocks choose again, each all its sites at once."""
        better: dict[Site, Chosen] = {}
        for method in {scheme.method: None for site in chosen if (scheme := self.schemes[site])}:
            if isinstance(method, BlockMethod):
                sites = [site for site in chosen if self.schemes[site].method == method]
                before = {site: self.tunable.pop(site) for site in sites}
                weights = {site.name: before[site].weight for site in sites}
                tuned = method.tune(weights, {site.name: chosen[site].encoded for site in sites}, block_run)
                for site in sites:
                    better[site] = chosen[site]._replace(encoded=tuned[site.name])
                    weight, _, activation, stats = before[site]
                    self.report(site, tuned[site.name], weight, activation, stats)
        return better

    def report(self, site: Site, encoded: Encoded, weight: Tensor, activation: Activation | None, stats: Stats) -> None:
        """Check what stands in a site's place from now on, and note it."""
        note = check_result(site, self.schemes[site], encoded, weight, stats)
        if note is not None:
            self.notes[site.name] = note
        self.by_site[site] = SiteReport.of(site, self.schemes[site], encoded, activation, weight)
