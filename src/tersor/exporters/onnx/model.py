"""A traced model with its sites: from one trace, every ONNX model that an export needs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from tersor.exporters.contract import Checkpoint, PackedSite
from tersor.exporters.onnx.blocks import rotary_tables
from tersor.exporters.onnx.convolutions import fold_norms
from tersor.exporters.onnx.fusions import biases_of_float_results, pads_into_convolutions, sums_before_norms
from tersor.exporters.onnx.language import Tables
from tersor.exporters.onnx.layers import Lowering, holds, lower
from tersor.exporters.onnx.trace import sites_in, trace
from tersor.formats.float_cast import FloatCast

SMALL = 128  # weights of a model, at least, for each number of a table


@dataclass(frozen=True)
class TracedModel:
    """A graph that still names its sites.

    Attributes:
        graph: the traced graph, from `trace`.
        sites: packed sites by name, as they will be written.
        notes: sentences for the user on sites that are not written as they are.
        tables: cosines and sines of a language model's rotary positions (blocks.py), if small beside its weights.
    """

    graph: ir.Model
    sites: Mapping[str, PackedSite]
    notes: tuple[str, ...]
    tables: Tables = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "TracedModel":
        """Trace the model in `dtype`. Sites that no operator holds become fp16 weights. Raises as `trace` does."""
        others = [packed for packed in checkpoint.sites if not holds(packed)]
        sites = {packed.site.name: packed for packed in checkpoint.sites}
        sites |= {packed.site.name: as_half(packed) for packed in others}
        examples = checkpoint.need_examples().cast(dtype)
        graph = trace(checkpoint.model.to(dtype), examples, sites.values())
        used = sites_in(graph)
        tables = rotary_tables(checkpoint.model) if examples.cached else None
        kept = sum(tensor.numel() for tensor in checkpoint.kept.values())
        num_weights = kept + sum(packed.site.num_weights for packed in checkpoint.sites)
        if tables is not None and SMALL * tables[0].numel() > num_weights:
            tables = None
        notes = (*left_out(set(sites) - used), *as_decoded(others))
        return cls(graph, {name: sites[name] for name in used}, notes, tables)

    def lower(self, choice: Lowering) -> ir.Model:
        """The model written out."""
        model = lower(self.graph, self.sites, choice, self.tables)
        fold_norms(model)
        pads_into_convolutions(model)
        sums_before_norms(model)
        biases_of_float_results(model)
        return model

    def as_float(self, choice: Lowering) -> ir.Model:
        """The same model with decoded weights and float inputs, for comparison."""
        return self.lower(replace(choice, decoded=frozenset(self.sites)))


def as_half(packed: PackedSite) -> PackedSite:
    """The same weights, decoded to fp16; the inputs stay float."""
    half = FloatCast("fp16")
    weight = packed.encoded.decode()
    half.fit(weight)
    return packed._replace(encoded=half.encode(weight, {}), activation=None)


def as_decoded(others: Iterable[PackedSite]) -> list[str]:
    """Notes on the sites that `as_half` changed."""
    schemes = sorted({packed.scheme for packed in others})
    return [f"written as decoded fp16 weights with float inputs: {', '.join(schemes)}"] if schemes else []


def left_out(missing: Iterable[str]) -> list[str]:
    """Notes on the sites that no output needs."""
    names = ", ".join(sorted(missing))
    return [f"left out, for no output needs it: {names}"] if names else []
