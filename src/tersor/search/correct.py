"""Correction of noise levels by the measured loss of every site, where the quadratic prediction fails.

At few bits the loss of a site is no longer what its curvature says. So each site is put into the original by itself, as
one level has made it, and the divergence of the outputs is measured on calibration data (as EXL3 and others choose bits
per layer: Turboderp 2025, https://github.com/turboderp-org/exllamav3). If the loss of a site is `a` times the
prediction at every level, then the levels that make all weights cost the same again are `1 / sqrt(a)` times as large.
"""

from math import exp, inf, log

import torch
from torch import nn

from tersor.calibration.divergence import divergence, outputs
from tersor.checkpoint.layout import packed_sites
from tersor.nn.copies import copy_but_sites, own_shared_weights
from tersor.nn.sites import find_sites
from tersor.tasks.contract import Task

NUM_EXAMPLES = 256  # of the calibration split, whose outputs are compared
WIDEST = 64.0  # how far a ratio may lie from that of the others


def measured_factors(
    original: nn.Module, compressed: nn.Module, levels: dict[str, float], task: Task
) -> dict[str, float]:
    """The factor for the level of each site, by name; around 1, with three digits.

    Embeddings keep theirs: the calibration data shows them with too few of their rows.

    Args:
        levels: levels of the sites to measure, at which `compressed` was made.
    """
    model = copy_but_sites(original)
    sites = {site.name: site for site in find_sites(model)}
    for site in sites.values():
        site.materialize(model)
    own_shared_weights(model, original)
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
    return factors(ratios, weights)


def factors(ratios: dict[str, float], weights: dict[str, int]) -> dict[str, float]:
    """`1 / sqrt(ratio)`, around 1 over the weights of all sites that cost anything at all.

    >>> factors({"a": 4.0, "b": 1.0, "never used": 0.0}, {"a": 10, "b": 10, "never used": 90})
    {'a': 0.707, 'b': 1.41, 'never used': 8.0}
    """
    logs = {name: log(ratio) if ratio > 0 else -inf for name, ratio in ratios.items()}
    used = [name for name in logs if logs[name] > -inf]
    middle = sum(weights[name] * logs[name] for name in used) / max(1, sum(weights[name] for name in used))
    most = log(WIDEST)
    return {name: float(f"{exp(-max(-most, min(most, value - middle)) / 2):.3g}") for name, value in logs.items()}
