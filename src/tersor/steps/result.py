"""One check of every compressed weight, whatever its method and format, before it takes the place of the original.

A result must be finite, and its error no larger than the format explains: that of plain rounding on the same weights
brought to a size where 16-bit scales and values neither overflow nor vanish. The error is that of the weights or, where
the inputs are known, that of the outputs, whichever is less.
"""

import torch
from torch import Tensor

from tersor.core.errors import FormatError
from tersor.formats.contract import Encoded, Grid, Weight
from tersor.methods.stats import Stats
from tersor.nn.sites import Site
from tersor.schemes.scheme import Scheme

SMALL = 0.1  # a relative error that needs no explanation
SLACK = 1.5  # times the error of plain rounding, for methods that trade one weight's error for another's
MOST = 1.001  # for formats that may leave out any part of a weight: worse than nothing
REPAIRING = 2.0  # where the site also repairs what was lost before it, and its target is another weight
LOST_ROW = 0.9  # relative error of a row that is as good as gone


def check_result(site: Site, scheme: Scheme, encoded: Encoded, weight: Weight, stats: Stats) -> str | None:
    """Raises FormatError naming the site, the scheme and the cause; returns a note where single rows are lost."""
    decoded = encoded.decode()
    out = f"use bf16, or exclude it with --exclude '{site.name}'"
    num_bad = decoded.numel() - int(torch.isfinite(decoded).sum())
    if num_bad:
        raise FormatError(
            f"{site.name}: {scheme} makes {num_bad} of {decoded.numel()} weights NaN or infinite (the largest is "
            f"{weight.abs().max().item():.2g}); {out}"
        )
    if weight.any() and not decoded.any():
        raise FormatError(
            f"{site.name}: {scheme} turns every weight to zero (the largest is {weight.abs().max().item():.2g}, too "
            f"small for fp16 scales or values); {out}"
        )
    error = relative_error(decoded - weight, weight, stats)
    if error > SMALL and error > most_error(scheme, weight, stats):
        raise FormatError(
            f"{site.name}: {scheme} leaves a relative error of {error:.2g} (weights up to "
            f"{weight.abs().max().item():.2g} do not go with its scales, or the inputs with its method); {out}"
        )
    return note_of_rows(site, scheme, decoded, weight)


def relative_error(error: Weight, weight: Weight, stats: Stats) -> float:
    """Relative error of the weights, or of the outputs on the calibration data if that is less; at least 0."""
    size = weight.abs().max().item() or 1.0
    error, weight = error.double() / size, weight.double() / size
    found = ratio(error.square().sum(), weight.square().sum())
    if stats.second_moment is not None:
        moment = stats.second_moment.to(weight)
        found = min(found, ratio(((error @ moment) * error).sum(), ((weight @ moment) * weight).sum()))
    return found


def ratio(error: Tensor, energy: Tensor) -> float:
    """The square root of `error / energy`; 0 if there is no error, infinite if only the energy is 0."""
    if not energy > 0:
        return 0.0 if error == 0 else float("inf")
    return (error / energy).clamp_min(0).sqrt().item()


def most_error(scheme: Scheme, weight: Weight, stats: Stats) -> float:
    """The largest relative error that a scheme explains; more than that is a fault."""
    if stats.cross_moment is not None and "cross_moment" in scheme.method.needs:
        return REPAIRING
    format = scheme.format
    if not format.rounds_each_weight:
        return MOST
    scaled = weight / weight.square().mean().sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
    try:
        plain = relative_error(format.fake_quantize(scaled, format.fit(scaled)) - scaled, scaled, stats)
    except FormatError:  # weights too far apart for the format at any size
        return MOST
    return min(MOST, SMALL + SLACK * plain)


def note_of_rows(site: Site, scheme: Scheme, decoded: Weight, weight: Weight) -> str | None:
    """A line for people where rows of a grid are lost, which its 16-bit scales are too coarse for."""
    if not isinstance(scheme.format, Grid):
        return None
    length = weight.double().norm(dim=1)
    lost = (length > 0) & ((decoded.double() - weight).norm(dim=1) > LOST_ROW * length)
    tiny = lost & (length < 1e-3 * length.max())
    if not tiny.any():
        return None
    return (
        f"{site.name}: {int(tiny.sum())} of {len(weight)} rows become zero in {scheme}: their weights, up to "
        f"{weight[tiny].abs().max().item():.2g}, are too small for its scales; use bf16 there if they matter"
    )
