"""One noise level for the whole model beside two ways that know no curvature of the loss: the loss at equal bits.

    python benchmarks/coded_schemes.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

Rows are `MODEL SCHEME BITS`. All schemes round whole numbers in the same sweep, with the same damping and repair, into
the same coder (methods/waterfill.py); only the steps differ:

`step`: one step per layer, a fixed share of the root mean square of its weights (GPTQ with an entropy code);
`columns`: `c / (sqrt(E) L_jj)` for column j, E the mean energy of the layer's output: columns are waterfilled within a
    layer, and all layers lose the same share of their output (in the manner of WaterSIC, Lifar et al. 2026,
    https://arxiv.org/abs/2603.04956);
`level`: `level / (sqrt(g_i) L_jj)`, one level for the model: what `tersor compress --coded` does;
`corrected`: the same with the level of each site corrected by its measured loss, as that command does below 3 bits a
    weight where a model has at most 64 sites.

The loss is the divergence from the original's outputs; the prediction beside it is the quadratic one of the codes
that were chosen, `1/2 sum_i g_i e_i S e_i'` over all sites. All rows of a model run in one process, which gathers its
statistics once; what is done is appended to FILE (JSON lines), so that a run that was stopped goes on where it was.
`--write` puts everything in FILE into coded_schemes.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol import KEPT, Assets, add_asset_options, open_original, open_protocol
from rows import Results, child_environment, last_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tersor.formats.contract import Encoded
    from tersor.methods.stats import Stats
    from tersor.nn.sites import Site
    from tersor.tasks.contract import Task

BITS = ("4", "3", "2.5", "2")
ASKED = {"resnet-20": (*BITS, "1.5"), "minilm": BITS, "smollm2": BITS}  # of a small model, side information is much
NAMES = {"step": "one step per layer", "columns": "columns", "level": "one level", "corrected": "corrected"}
SCHEMES = {"resnet-20": list(NAMES), "minilm": list(NAMES), "smollm2": list(NAMES)[:3]}
ROWS = [
    f"{model} {scheme} {bits}"
    for model, schemes in SCHEMES.items()
    for bits in ASKED[model]
    for scheme in schemes
    if scheme != "corrected" or float(bits) < 3
]
UNITS = {"resnet-20": "KL", "minilm": "1 - cosine", "smollm2": "KL"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-schemes.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        measure(args.rows, assets, Results(args.results))
        return 0
    failed = False
    for model in SCHEMES:
        left = [row for row in args.rows if row.split()[0] == model and row not in Results(args.results)]
        if left:
            command = [sys.executable, __file__, *assets.options, "--run", "--results", str(args.results), "--rows"]
            child = subprocess.run([*command, *left], env=child_environment(1), stderr=subprocess.PIPE)
            if child.returncode:
                print(f"{model}: exit {child.returncode}: {last_line(child.stderr)}", file=sys.stderr)
                failed = True
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(Results(args.results).among(ROWS)))
    return int(failed)


# In the process of one model.


@dataclass(frozen=True)
class Bench:
    """A model and its data.

    Attributes:
        exclude: of the sites, those that are kept.
        stats: the curvature of the loss at every site.
        before: outputs of the original.
        batch_size: examples at a time.
    """

    model: nn.Module
    task: Task
    exclude: tuple[str, ...]
    stats: Mapping[str, Stats]
    before: list[Tensor]
    batch_size: int


def measure(rows: list[str], assets: Assets, results: Results) -> None:
    """All rows are of one model."""
    import torch

    torch.set_num_threads(1)
    bench = open_bench(rows[0].split()[0], assets)
    forecasts = foresee(bench)
    corrected: Any = None
    for row in rows:
        _, scheme, bits = row.split()
        began = time.process_time()
        if scheme == "corrected":
            corrected = corrected or correct(bench)
            searching, forecast = corrected
            result = measure_one(bench, "level", forecast.level_of(float(bits)), searching.factors)
        else:
            result = measure_one(bench, scheme, forecasts[scheme].level_of(float(bits)), {})
        print(line(results.add(row, result | {"cpu": time.process_time() - began})), flush=True)


def open_bench(name: str, assets: Assets) -> Bench:
    from models import open_cifar, open_resnet

    from tersor.calibration.curvature import estimate_fisher
    from tersor.calibration.divergence import outputs
    from tersor.checkpoint.open import open_model
    from tersor.tasks.data import Data

    model: nn.Module
    exclude: tuple[str, ...] = ()
    if name == "resnet-20":
        model, task, batch_size = open_resnet(assets.root), open_cifar(assets.root, calibration_examples=512), 128
    elif name == "minilm":
        source = open_model(str(assets.root / "minilm"))
        task = Data("similarity", assets.root / "text" / "stsb-dev.csv").open(source)
        model, batch_size, exclude = source.model, 32, ("*embeddings*",)
    else:
        model, task, batch_size, exclude = open_model(str(assets.model)).model, open_protocol(assets), 2, (KEPT,)
    original = open_original(assets) if name == "smollm2" else model
    before = list(outputs(original, task, "eval", 2048, batch_size))
    return Bench(model, task, exclude, estimate_fisher(model, task), before, batch_size)


def coded_sites(bench: Bench) -> list[Site]:
    from tersor.nn.sites import find_sites
    from tersor.recipe import Recipe

    step = Recipe.of("coded", exclude=bench.exclude).weights[0]
    return [site for site, scheme in step.assign(find_sites(bench.model)) if scheme is not None]


def foresee(bench: Bench) -> dict[str, Any]:
    """What every scheme's levels cost, from one walk over the model as it is."""
    from tersor.calibration.plan import survey
    from tersor.calibration.walk import SiteObserver, walk
    from tersor.search.noise_level import Forecast

    counts: dict[str, Tensor] = {}

    def look(site: Site, moments: Stats) -> None:
        weight, stats = site.matrix(bench.model), known(bench, site, moments)
        for scheme in ("step", "columns", "level"):
            counts[scheme] = counts.get(scheme, 0) + deviations_of(scheme, weight, stats)

    walk(survey(bench.model, bench.task, coded_sites(bench)), SiteObserver(frozenset({"second_moment"}), look))
    return {scheme: Forecast(found) for scheme, found in counts.items()}


def correct(bench: Bench) -> Any:
    """The search for a level with one measured factor for each site, and its forecast."""
    from tersor.recipe import Recipe
    from tersor.search.noise_level import FEW_BITS, NoiseLevelSearch

    step = Recipe.of("keep", exclude=bench.exclude).weights[0]
    searching = NoiseLevelSearch(bench.model, bench.task, step, bench.stats)
    return searching.corrected(searching.foresee().level_of(FEW_BITS))


@dataclass
class Coder:
    """A visitor that codes every site by one scheme, and adds up the loss that this predicts."""

    bench: Bench
    model: nn.Module
    scheme: str
    level: float
    factors: Mapping[str, float]
    predicted: float = 0.0
    needs: frozenset[str] = frozenset({"second_moment", "cross_moment"})

    def visit_site(self, site: Site, moments: Stats) -> Any:
        from tersor.calibration.walk import Chosen

        weight, stats = site.matrix(self.model), known(self.bench, site, moments)
        encoded = coded(self.scheme, self.level * self.factors.get(site.name, 1.0), weight, stats)
        self.predicted += quadratic_loss(encoded.decode() - repaired(weight, stats), stats)
        return Chosen(encoded)

    def tune_block(self, block_run: Any, chosen: Any) -> dict[Site, Any]:
        return {}


def measure_one(bench: Bench, scheme: str, level: float, factors: Mapping[str, float]) -> dict[str, Any]:
    """Compress, save, and compare the outputs."""
    import tersor
    from tersor.calibration.divergence import divergence, outputs
    from tersor.calibration.plan import survey
    from tersor.calibration.walk import walk
    from tersor.checkpoint.container import Container
    from tersor.checkpoint.layout import CODED
    from tersor.nn.copies import copy_but_sites

    sites = coded_sites(bench)
    model, original = copy_but_sites(bench.model), copy_but_sites(bench.model)

    coder = Coder(bench, model, scheme, level, factors)
    walk(survey(model, bench.task, sites), coder, original)
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(model, folder)
        measured = tersor.load(folder, packed=False).float() if hasattr(model, "config") else model
        container = Container(Path(folder) / CODED)
        parts = {site.parameter for site in sites}
        names = [name for name in container.entries if name.rpartition(".")[0] not in parts]
        num_bytes = (Path(folder) / CODED).stat().st_size - sum(map(container.stored_bytes, names))
    after = list(outputs(measured, bench.task, "eval", 2048, bench.batch_size))
    return {
        "level": level,
        "bits": 8 * num_bytes / sum(site.num_weights for site in sites),
        "loss": divergence(bench.before, after, bench.task.output),
        "predicted": coder.predicted,
    }


def known(bench: Bench, site: Site, moments: Stats) -> Stats:
    found = bench.stats[site.name]
    return replace(moments, row_weight=found.row_weight, column_weight=found.column_weight)


# What differs between the schemes.


def coded(scheme: str, level: float, weight: Tensor, stats: Stats) -> Encoded:
    """One site at one level."""
    import torch

    from tersor.formats.coded import Coded, scales
    from tersor.methods.filling import ColumnRounder
    from tersor.methods.solver import pose, sweep
    from tersor.methods.waterfill import STEPS_DAMPING, Waterfill, damping_of

    if scheme != "step":
        return Waterfill(level).compress(weight, Coded(), curvature_of(scheme, stats))
    alone = replace(stats, cross_moment=None)
    problem = pose(repaired(weight, stats), alone, damping_of(weight, stats, STEPS_DAMPING), upstream_correction=0.0)
    steps = scales(torch.ones_like(weight[:, 0]), torch.full_like(weight[0], level * spread(weight)))
    filling = ColumnRounder(problem, steps, 0.0, weight != 0)
    return Coded().encode(sweep(problem, filling), filling.params)


def deviations_of(scheme: str, weight: Tensor, stats: Stats) -> Tensor:
    """How many codes of a site deviate how much at level 1, as `deviations` counts them."""
    import numpy as np
    import torch

    from tersor.methods.filling import spreads
    from tersor.methods.solver import pose
    from tersor.methods.waterfill import STEPS_DAMPING, damping_of, deviations, histogram, row_curvature

    problem = pose(weight, stats, damping_of(weight, stats, STEPS_DAMPING), upstream_correction=0.0)
    if scheme == "step":
        row, column = spreads(problem, torch.full_like(weight[:, 0], spread(weight)))
        return torch.from_numpy(np.convolve(histogram(row), histogram(column)))
    return deviations(problem, row_curvature(weight, problem, curvature_of(scheme, stats)).rsqrt())


def curvature_of(scheme: str, stats: Stats) -> Stats:
    """Without the curvature of the loss, that of a site's output relative to its energy stands in."""
    return replace(stats, row_weight=None) if scheme == "columns" else stats


def spread(weight: Tensor) -> float:
    """The root mean square."""
    return weight.square().mean().sqrt().item()


def repaired(weight: Tensor, stats: Stats) -> Tensor:
    """What is rounded: the weight that makes up for a part of the error before it."""
    from tersor.methods.solver import pose
    from tersor.methods.waterfill import UPSTREAM_DAMPING, Waterfill, damping_of

    return pose(weight, stats, damping_of(weight, stats, UPSTREAM_DAMPING), Waterfill().upstream_correction).target


def quadratic_loss(error: Tensor, stats: Stats) -> float:
    """`1/2 sum_i g_i e_i S e_i'`, in the unit of the task's output."""
    assert stats.row_weight is not None
    assert stats.second_moment is not None
    of_rows = ((error @ stats.second_moment) * error).sum(1)
    return 0.5 * (stats.row_weight @ of_rows).item() / stats.second_moment.diagonal().mean().item()


# The page.


def line(result: dict[str, Any]) -> str:
    model, scheme, bits = result["row"].split()
    return (
        f"| {model} | {NAMES[scheme]} | {bits} | {result['bits']:.3f} | {result['loss']:.4f} "
        f"| {result['predicted']:.4f} | {result['loss'] / result['predicted']:.1f} | {result['cpu']:.0f} |"
    )


def at_equal_bits(results: list[dict[str, Any]], bits: float) -> float | None:
    """The loss of one scheme at exactly `bits`: its logarithm is a straight line between the two nearest rows."""
    nearest = sorted(results, key=lambda result: abs(result["bits"] - bits))[:2]
    if len(nearest) < 2 or bits < min(each["bits"] for each in results) - 0.1:
        return None
    (x0, y0), (x1, y1) = ((each["bits"], log(each["loss"])) for each in nearest)
    return exp(y0 + (bits - x0) * (y1 - y0) / (x1 - x0))


def equal_line(results: list[dict[str, Any]], model: str, bits: str) -> str:
    cells = []
    for scheme in NAMES:
        found = [each for each in results if each["row"].split()[:2] == [model, scheme]]
        loss = at_equal_bits(found, float(bits)) if f"{model} {scheme} {bits}" in ROWS else None
        cells.append("" if loss is None else f"{loss:.4f}")
    return f"| {model}, {UNITS[model]} | {bits} | {' | '.join(cells)} |"


def page(results: list[dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about, listing = machine(), "\n".join(map(line, results))
    models = [model for model in SCHEMES if any(each["row"].startswith(model) for each in results)]
    equal = "\n".join(equal_line(results, model, bits) for model in models for bits in BITS)
    return f"""# One noise level beside other ways to choose steps

Command: `python benchmarks/coded_schemes.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread.

All schemes round whole numbers in the same sweep, with the same damping and repair, into the same coder; only the steps
differ. *One step per layer*: a fixed share of the root mean square of the layer's weights (GPTQ with an entropy code).
*Columns*: waterfilled within a layer, each layer losing the same share of its output (in the manner of WaterSIC, Lifar
et al. 2026). *One level*: one number for all weights of the model, by the curvature of the loss. *Corrected*: the same
with the level of each site corrected by its measured loss, as `compress --coded` does below 3 bits a weight where a
model has at most 64 sites; SmolLM2 has more. All weights of ResNet-20; the linear weights of all-MiniLM-L6-v2 and of
SmolLM2-135M-Instruct, embeddings and head kept.

Bits are bytes of `model.tersor`, less what the kept tensors take; tables, scales and headers are inside. The loss is
the divergence from the original's outputs on data that calibration did not see: 2,048 test images (KL, nats), the
sentences of STS-B dev (1 - cosine), four windows of 512 tokens of WikiText-2 test (KL, nats per token). Calibration:
512 training images; 128 pairs of sentences; 32 windows of 512 tokens of WikiText-2 valid.

## Loss at equal bits

Between the measured rows below, and up to 0.1 bits beside them, the logarithm of the loss is taken as a straight line
over the bits.

| model | bits | {" | ".join(NAMES.values())} |
|---|---|{"---|" * len(NAMES)}
{equal}

## What was measured, and what was predicted

Predicted is `1/2 sum_i g_i e_i S e_i'` over all sites, from the curvature of the loss and the codes that were chosen.

| model | scheme | asked | bits | loss | predicted | measured / predicted | CPU s |
|---|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
