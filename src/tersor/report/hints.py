"""Hints for a model that came out slower, or takes more memory, than the original."""

from collections.abc import Iterable, Sequence

from tersor.core.processor import byte_products, multiplies_bytes
from tersor.measure.scorecard import Scorecard
from tersor.report.card import megabytes
from tersor.steps.site_report import SiteReport

EXPORT = "tersor export writes it for a runtime that has kernels for it, such as --to openvino or --to onnx"


def hints(original: Scorecard, compressed: Scorecard, sites: Sequence[SiteReport]) -> list[str]:
    """Sentences, none where the model is neither slower nor larger in memory."""
    found = []
    if any(latency.speedup_interval[1] < 1 for latency in compressed.latency):
        found.append(f"slower: {why_slower(sites)}")
    if original.peak_memory and compressed.peak_memory and compressed.peak_memory > original.peak_memory:
        found.append(
            f"more memory: a pass took {megabytes(compressed.peak_memory)} at most, the original's "
            f"{megabytes(original.peak_memory)}; the file is smaller, but what is decoded or rounded for a moment "
            f"outweighs it in a model of this size. tersor.load(..., packed=False) takes what the original takes"
        )
    return found


def why_slower(sites: Sequence[SiteReport]) -> str:
    """The cause, and a cure that is not in use already."""
    floats = [site for site in sites if site.activation is None]
    if not floats:
        cause = "rounding the inputs to integers costs more here than the int8 products save"
        if not multiplies_bytes():
            cause += f"; {byte_products()}"
        return f"{cause}; {EXPORT}"
    cures = "tersor.load(..., packed=False) decodes once"
    if len(floats) == len(sites) and any(site.kind == "linear" for site in sites):
        cures += ", int8-dynamic computes on packed weights"
    schemes = ", ".join(sorted({site.scheme for site in floats})[:3])
    return f"the weights in {schemes} are made float at every call, to save memory; {cures}, and {EXPORT}"


def slow_here(int8: Iterable[str]) -> list[str]:
    """A note, before any work, if int8 products will be slow on this processor; no note otherwise."""
    names = ", ".join(int8)
    return [f"{names}: {byte_products()}"] if names and not multiplies_bytes() else []
