"""The visitor that predicts the loss of every site in its scheme, without a change to the model."""

from collections.abc import Mapping

from torch import Tensor, nn

from tersor.activations.quantizers import Activation
from tersor.calibration.blocks import ReplayableBlock
from tersor.calibration.walk import Chosen
from tersor.core.threads import threads
from tersor.formats.contract import Encoded
from tersor.methods.stats import Stats
from tersor.nn.sites import Site
from tersor.steps.result import check_result
from tersor.steps.step_visitor import CURVATURE, Calibration, StepVisitor, needs_of
from tersor.steps.weights import WeightsStep


class LossPredictor(StepVisitor):
    """Packs every site as a weights step says, fitted to the model as it is, which stays as it is.

    Attributes:
        packed: what each site would get.
        predicted: the loss that this would cost, by the site's name, in the loss of the task's output per example.
    """

    def __init__(self, model: nn.Module, step: WeightsStep, calibration: Calibration):
        super().__init__(model, step, calibration)
        self.packed: dict[Site, tuple[Encoded, Activation | None]] = {}
        self.predicted: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the methods and the prediction read."""
        return needs_of(self.model, self.schemes) | CURVATURE | {"sample"}

    def visit_site(self, site: Site, stats: Stats) -> None:
        """Note what a site would get, and what that would cost."""
        weight, encoded, activation, stats = self.compress(site, stats)
        check_result(site, self.schemes[site], encoded, weight, stats)
        self.predicted[site.name] = predicted_loss(weight, encoded, activation, stats)
        self.packed[site] = encoded, activation

    def tune_block(self, block_run: ReplayableBlock, chosen: Mapping[Site, Chosen]) -> dict[Site, Chosen]:
        """No choices: the model stays as it is."""
        return {}


@threads(1)
def predicted_loss(weight: Tensor, encoded: Encoded, activation: Activation | None, stats: Stats) -> float:
    """The loss of one site, from the curvature and a sample of its inputs; without one, of its weights' error alone."""
    if stats.sample is None or not len(stats.sample) or stats.row_weight is None:
        return stats.loss(encoded.decode() - weight)
    x = stats.sample.float()
    quantized = activation.fake_quantize(x) if activation else x
    error = quantized @ encoded.decode().t() - x @ weight.t()
    # The Fisher information of row i sums to g_i E[x'x] over its columns, and row_weight is its mean.
    length = x.square().sum(1).mean().clamp_min(1e-30).item()
    return 0.5 * weight.shape[1] / length * (stats.row_weight @ error.square().mean(0)).item()
