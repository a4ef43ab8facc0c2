"""A traced model with its sites: from one trace, every ONNX model that an export needs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from tersor.export.contract import Checkpoint, PackedSite
from tersor.export.onnx.convolutions import fold_norms
from tersor.export.onnx.fusions import sums_before_norms
from tersor.export.onnx.layers import Lowering, holds, lower
from tersor.export.onnx.trace import sites_in, trace
from tersor.formats.float_cast import FloatCast


@dataclass(frozen=True)
class TracedModel:
    """A graph that still names its sites.

    Attributes:
        graph: as `trace` made it.
        sites: by name, as they will be written.
        notes: what the user should know of sites that are not written as they are.
    """

    graph: ir.Model
    sites: Mapping[str, PackedSite]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "TracedModel":
        """Trace the model in `dtype`. Sites that no operator holds become fp16 weights. Raises as `trace` does."""
        others = [packed for packed in checkpoint.sites if not holds(packed)]
        sites = {packed.site.name: packed for packed in checkpoint.sites}
        sites |= {packed.site.name: as_half(packed) for packed in others}
        examples = checkpoint.need_examples().cast(dtype)
        graph = trace(checkpoint.model.to(dtype), examples, sites.values())
        used = sites_in(graph)
        notes = (*left_out(set(sites) - used), *as_decoded(others))
        return cls(graph, {name: sites[name] for name in used}, notes)

    def lower(self, choice: Lowering) -> ir.Model:
        """The model written out."""
        model = lower(self.graph, self.sites, choice)
        fold_norms(model)
        sums_before_norms(model)
        return model

    def as_float(self, choice: Lowering) -> ir.Model:
        """The same with decoded weights and float inputs."""
        return self.lower(replace(choice, decoded=frozenset(self.sites)))


def as_half(packed: PackedSite) -> PackedSite:
    """The same weights, decoded to fp16; the inputs stay float."""
    half = FloatCast("fp16")
    weight = packed.encoded.decode()
    half.fit(weight)
    return packed._replace(encoded=half.encode(weight, {}), activation=None)


def as_decoded(others: Iterable[PackedSite]) -> list[str]:
    """What to know of sites that `as_half` changed."""
    schemes = sorted({packed.scheme for packed in others})
    return [f"written as decoded fp16 weights with float inputs: {', '.join(schemes)}"] if schemes else []


def left_out(missing: Iterable[str]) -> list[str]:
    """What to know of sites that no output needs."""
    names = ", ".join(sorted(missing))
    return [f"left out, for no output needs it: {names}"] if names else []
