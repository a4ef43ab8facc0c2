"""Choosing the sites that stay float because quantizing them costs too much, by measured loss.

Every site is packed as the step says, fitted to the float model. Its loss is predicted from the error at its outputs,

    1/2 sum_i g_i E[(W' x' - W x)_i^2],    g_i from the curvature of calibration/curvature.py,

which counts the input's quantization too, and the sites that rank first are measured: one site in its scheme, all
others as they were, outputs compared on the calibration data (as in Wu et al. 2020, section 5.2,
https://arxiv.org/abs/2004.09602, where the sites that cost most stay float until the accuracy is back).

`auto` keeps the fewest sites, worst first, without which at most half of the whole loss is left. Where that takes more
than a tenth of the sites, no few are to blame and none is kept, nor where the whole loss is negligible. A linear site
whose static input is to blame gets a dynamic one instead. A number keeps that many sites float.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tersor.activations.quantizers import Activation, IntStatic, activation_named
from tersor.calibration.curvature import batch_size
from tersor.calibration.divergence import UNITS, divergence, outputs
from tersor.core.progress import Progress
from tersor.core.threads import total
from tersor.formats.contract import Encoded
from tersor.nn.copies import copy_but_sites
from tersor.nn.sites import Site, escape
from tersor.schemes.scheme import KEEP, Scheme
from tersor.steps.weights import WeightsStep
from tersor.tasks.contract import Task

LEFT = 0.5  # share of the whole loss that may be left
MOST_SITES = 0.1  # share of the sites that may be kept
NEGLIGIBLE = 1e-3  # nats, or as a share of half the squared length of the outputs
NUM_MEASURED = 24  # sites
NUM_EXAMPLES = 128  # of the calibration split
DYNAMIC = 0.25  # a dynamic input must leave no more than this share of the site's loss
Packed = Mapping[Site, tuple[Encoded, Activation | None]]


@dataclass(frozen=True)
class SiteLoss:
    """One site in its scheme, all others as they were. `measured` is None where only the prediction is known."""

    site: str
    scheme: str
    predicted: float
    measured: float | None

    @property
    def rank(self) -> tuple[bool, float]:
        """A key for sorting: measured losses after predicted ones, and the largest loss last."""
        return (self.measured is not None, self.predicted if self.measured is None else self.measured)


@dataclass(frozen=True)
class KeptFloat:
    """The sites that `keep_float` leaves float, and the measured losses that say why.

    Attributes:
        unit: of all losses.
        loss: measured with every site in its scheme.
        loss_left: measured with the kept sites as `kept` says.
        kept: site to what it gets instead: `keep`, or a scheme with a dynamic input.
        sites: all sites, the worst first.
        reason: in a sentence.
    """

    unit: str
    loss: float
    loss_left: float
    kept: dict[str, str]
    sites: list[SiteLoss]
    reason: str

    def note(self) -> str:
        """One line for people: which sites stay float, what each costs alone, and what is left."""
        if not self.kept:
            return f"keep_float: no site, {self.reason}"
        named = {s.site: f"{s.site} (alone {s.measured:.3g})" for s in self.sites if s.measured is not None}
        done = [f"{named.get(n, n)}: {'float' if to == KEEP else to}" for n, to in self.kept.items()]
        return f"keep_float: {'; '.join(done)}; {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"sites": [vars(site) for site in self.sites]}


def choose(
    model: nn.Module,
    asked: str | int,
    task: Task,
    schemes: Mapping[str, Scheme],
    packed: Packed,
    predicted: Mapping[str, float],
    progress: Progress,
) -> KeptFloat:
    """Measure sites of `model` alone and choose those that `asked`, a step's `keep_float`, lets stay float.

    Args:
        schemes: of each site, by name.
        packed: what each site would get, made for `model` as it is (see loss_predictor.py).
        predicted: the loss of each site alone, by name.
    """
    size = batch_size(model, task)

    def outputs_of(model: nn.Module) -> list[Tensor]:
        return list(outputs(model, task, "calibration", NUM_EXAMPLES, size))

    original = outputs_of(model)

    def loss_of(sites: Packed) -> float:
        made = copy_but_sites(model)
        for site, (encoded, activation) in sites.items():
            site.replace(made, encoded, activation)
        return divergence(original, outputs_of(made), task.output)

    ranked = sorted(packed, key=lambda site: predicted[site.name], reverse=True)
    num_measured = max(NUM_MEASURED, asked if isinstance(asked, int) else 0)
    losses = []
    for done, site in enumerate(ranked):
        measured = None
        if done < num_measured:
            progress("measuring sites alone", done, min(num_measured, len(ranked)))
            measured = loss_of({site: packed[site]})
        losses.append(SiteLoss(site.name, str(schemes[site.name]), predicted[site.name], measured))
    losses.sort(key=lambda each: each.rank, reverse=True)
    places = {each.site: place for place, each in enumerate(losses)}
    worst = sorted(packed, key=lambda site: places[site.name])
    whole, unit = loss_of(packed), UNITS[task.output]
    if isinstance(asked, int):
        kept = {site.name: KEEP for site in worst[:asked]}
        left = loss_of({site: made for site, made in packed.items() if site.name not in kept})
        reason = f"{asked} were asked for: {left:.3g} of {whole:.3g} {unit} are left"
        return KeptFloat(unit, whole, left, kept, losses, reason)
    return automatic(packed, schemes, worst, losses, loss_of, whole, negligible(original, task), unit)


def automatic(
    made: Packed,
    schemes: Mapping[str, Scheme],
    worst: list[Site],
    losses: list[SiteLoss],
    loss_of: Callable[[Packed], float],
    whole: float,
    floor: float,
    unit: str,
) -> KeptFloat:
    """The sites that `auto` keeps float; `worst` are the sites, the worst first."""
    if whole <= floor:
        reason = f"all sites together cost {whole:.3g} {unit}, which is negligible"
        return KeptFloat(unit, whole, whole, {}, losses, reason)
    alone = {each.site: each.measured for each in losses}
    num_most, kept, changed = max(1, int(MOST_SITES * len(made))), {}, dict(made)
    for site in worst[:num_most]:
        kept[site.name] = KEEP
        del changed[site]
        dynamic = with_dynamic_input(site, schemes[site.name])
        measured = alone[site.name]
        if dynamic is not None and measured is not None:
            instead = (made[site][0], Activation("int8-dynamic"))
            if loss_of({site: instead}) <= DYNAMIC * measured:
                kept[site.name], changed[site] = str(dynamic), instead
        left = loss_of(changed)
        if left <= LEFT * whole:
            reason = f"{left:.3g} of {whole:.3g} {unit} are left"
            return KeptFloat(unit, whole, left, kept, losses, reason)
    reason = f"the worst {num_most} of {len(made)} are not to blame for half of the {whole:.3g} {unit}"
    return KeptFloat(unit, whole, whole, {}, losses, reason)


def with_dynamic_input(site: Site, scheme: Scheme) -> Scheme | None:
    """The scheme with an input that is quantized as it comes, for linear sites whose static input has 8 bits."""
    if site.kind != "linear" or scheme.activation is None or activation_named(scheme.activation) != IntStatic(8):
        return None
    return replace(scheme, activation="int8-dynamic", observer=None)


def negligible(original: list[Tensor], task: Task) -> float:
    """The loss below which nothing needs to be kept."""
    if task.output == "logits":
        return NEGLIGIBLE
    squares, num_rows = sum(total(rows.square()).item() for rows in original), sum(map(len, original))
    return NEGLIGIBLE * 0.5 * squares / max(1, num_rows)


def spared(step: WeightsStep, choice: KeptFloat) -> WeightsStep:
    """The step with rules for the chosen sites, and `keep_float` off."""
    instead = {escape(name): scheme for name, scheme in choice.kept.items()}
    rules = {pattern: scheme for pattern, scheme in step.rules.items() if pattern not in instead} | instead
    return step.model_copy(update={"rules": rules, "keep_float": "none"})
