"""Cross-layer equalization (Nagel et al. 2019, https://arxiv.org/abs/1906.04721).

ReLU passes positive factors through: `relu(s y) = s relu(y)`. So a channel between two layers can be scaled down in the
rows of the first and up in the columns of the second. The factor `sqrt(r1 / r2)` makes the ranges r1 of the row and r2
of the column equal, and grids with one scale for the whole tensor lose nothing to channels of very different range.
ReLU6 and smooth activations do not pass factors; their pairs are left as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import InputError, ModelError
from tersor.methods.stats import Stats
from tersor.nn.connections.graph import LAYERS, Graph, is_batch_norm
from tersor.nn.parameters import parameter, set_parameter
from tersor.transforms.fold_bn import is_neutral, of_one_axis

EACH_NUMBER = (nn.ReLU, nn.Identity, nn.Dropout, nn.Dropout2d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)  # channels are not the last axis, of which they take
RELUS = (F.relu, torch.relu)


@dataclass(frozen=True)
class Equalize:
    """Equalize the ranges of neighbouring layers; batch norms between them must be folded first.

    Attributes:
        num_sweeps: how often all pairs are visited; every layer but the ends is in two.
    """

    num_sweeps: int = 20

    name = "equalize"
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if self.num_sweeps < 1:
            raise InputError(f"equalize: num_sweeps={self.num_sweeps} is not above 0; give for example 20")

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        links = find_links(Graph.of(model, self.name), stats)
        if not links:
            raise ModelError(
                f"equalize: {type(model).__name__} has no two layers with only ReLU between them (fold batch norms "
                f"first: fold-bn); leave equalize out"
            )
        for _ in range(self.num_sweeps):
            for link in links:
                link.equalize()


@dataclass(frozen=True)
class Link:
    """A layer, the neutral batch norms behind it, and the one layer that reads them."""

    source: nn.Module
    norms: tuple[nn.Module, ...]
    reader: nn.Module

    def equalize(self) -> None:
        weight, columns = parameter(self.source, "weight"), by_channel(self.reader)
        rows = weight.abs().flatten(1).amax(1).double()
        columns_max = columns.abs().flatten(1).amax(1).double()
        dead = (rows == 0) | (columns_max == 0)
        factor = torch.where(dead, 1.0, (rows / columns_max).sqrt())
        for module in (self.source, *self.norms):
            if module.bias is not None:
                set_parameter(module, "bias", parameter(module, "bias") / factor)
        set_parameter(self.source, "weight", weight / factor.view(-1, *[1] * (weight.dim() - 1)))
        scale_channels(self.reader, factor)


def find_links(graph: Graph, stats: Mapping[str, Stats]) -> list[Link]:
    """All pairs of layers that a factor per channel can move between."""
    links = []
    for path in graph.calls:
        passed: list[nn.Module] = []
        found = graph.source(path, partial(passes_factors, graph, passed))
        reader, source = graph.model.get_submodule(path), graph.model.get_submodule(found) if found else None
        num_axes = stats.get(found or "", Stats()).num_axes
        if fit_together(source, reader) and all(keeps_channels(source, module, num_axes) for module in passed):  # type: ignore[arg-type]
            links.append(Link(source, tuple(filter(is_batch_norm, passed)), reader))  # type: ignore[arg-type]
    return links


def passes_factors(graph: Graph, passed: list[nn.Module], node: torch.fx.Node) -> bool:
    """True if a positive factor on the channels of a node's input comes out of it. What depends on the axis of the
    channels for that joins `passed`: pools, and batch norms, which need a smaller bias as well."""
    module = graph.module(node)
    if module is not None and ((is_batch_norm(module) and is_neutral(module)) or type(module) in POOLS):
        passed.append(module)
        return True
    function = node.op == "call_function" and node.target in RELUS
    return function or (node.op, node.target) == ("call_method", "relu") or type(module) in EACH_NUMBER


def keeps_channels(source: nn.Module, module: nn.Module, num_axes: int | None) -> bool:
    """True if a pool or a batch norm has the source's outputs for channels."""
    return not isinstance(source, nn.Linear) if type(module) in POOLS else of_one_axis(source, module, num_axes)


def fit_together(source: nn.Module | None, reader: nn.Module) -> bool:
    """True if the source's rows are the channels of the reader's columns."""
    if type(source) not in LAYERS or type(reader) not in LAYERS:
        return False
    both_linear = (type(source) is nn.Linear) == (type(reader) is nn.Linear)
    return both_linear and takes_channels(reader) and len(parameter(source, "weight")) == num_channels(reader)  # type: ignore[arg-type]


def takes_channels(layer: nn.Module) -> bool:
    """True if columns belong to channels simply: one group, or one channel in each."""
    groups = getattr(layer, "groups", 1)
    return groups in (1, num_channels(layer))


def num_channels(layer: nn.Module) -> int:
    """The number of channels that a layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def by_channel(layer: nn.Module) -> Float[Tensor, "channel ..."]:
    """The weights that read each input channel."""
    weight = parameter(layer, "weight")
    if getattr(layer, "groups", 1) == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (num_channels(layer), -1))


def scale_channels(layer: nn.Module, factor: Float[Tensor, " channel"]) -> None:
    """Multiply what reads each input channel."""
    columns = by_channel(layer)
    scaled = columns * factor.view(-1, *[1] * (columns.dim() - 1))
    one_group = getattr(layer, "groups", 1) == 1
    set_parameter(layer, "weight", scaled.transpose(0, 1) if one_group else scaled.flatten(0, 1))
