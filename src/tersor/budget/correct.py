"""Where the quadratic prediction fails: the loss of every site measured, and the level of each corrected by it.

At few bits the loss of a site is no longer what its curvature says: that of a classifier's last layer may be a hundred
times as much, that of a layer inside a residual stack a tenth. So each site is put into the original by itself, as one
level has made it, and the divergence of the outputs is measured on calibration data (as EXL3 and others choose bits per
layer: Turboderp 2025, https://github.com/turboderp-org/exllamav3). If the loss of a site is `a` times the prediction at
every level, then the levels that make all weights cost the same again are `1 / sqrt(a)` times as large.
"""

import copy
from math import exp, log

import torch
from torch import nn

from tersor.analysis.divergence import divergence, outputs
from tersor.checkpoint.layout import packed_sites
from tersor.sites import find_sites
from tersor.tasks.contract import Task

NUM_EXAMPLES = 256  # of the calibration split, whose outputs are compared
WIDEST = 64.0  # how far a ratio may lie from that of the others


def measured_factors(
    original: nn.Module, compressed: nn.Module, levels: dict[str, float], task: Task
) -> dict[str, float]:
    """By what to multiply the level of each site; around 1, three digits.

    Embeddings keep theirs: the calibration data shows them with too few of their rows.

    Args:
        levels: of the sites to measure, at which `compressed` was made.
    """
    model = copy.deepcopy(original)
    sites = {site.name: site for site in find_sites(model)}
    before = list(outputs(original, task, "calibration", NUM_EXAMPLES))
    ratios, weights = {}, {}
    for site, packed, _ in packed_sites(compressed):
        if site.name not in levels or site.kind == "embedding":
            continue
        weight = sites[site.name].weight(model)
        kept = weight.data
        with torch.no_grad():
            weight.data = site.fold.unfold(packed.encoded.decode()).to(kept.dtype)
            loss = divergence(before, outputs(model, task, "calibration", NUM_EXAMPLES), task.output)
        weight.data = kept
        ratios[site.name] = loss / (site.num_weights * levels[site.name] ** 2 / 24)
        weights[site.name] = site.num_weights
    logs = {name: log(max(ratio, 1e-30)) for name, ratio in ratios.items()}
    middle = sum(weights[name] * value for name, value in logs.items()) / max(1, sum(weights.values()))
    reach = log(WIDEST)
    return {name: float(f"{exp(-max(-reach, min(reach, value - middle)) / 2):.3g}") for name, value in logs.items()}
