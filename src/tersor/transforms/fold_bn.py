"""Batch-norm folding (Jacob et al. 2017, section 3.2, https://arxiv.org/abs/1712.05877).

In eval mode a batch norm is a factor and an offset per channel. Where it reads a convolution or a linear layer that
nothing else reads, the factor moves into that layer's weight. The model keeps its modules, so that an artifact still
loads into it: the batch norm becomes neutral (mean 0, variance and gain 1), and the offset moves into the layer's bias
or, where it has none, stays as the batch norm's own.

The channels of a batch norm are the second axis of its input. Those of a convolution's outputs are, too; the outputs of
a linear layer lie on the last axis, which is the second only where there are two. So linear layers are folded into
where calibration has shown such inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.methods.stats import Stats
from tersor.nn.connections.graph import Graph, is_batch_norm
from tersor.nn.parameters import parameter, set_parameter

AXES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


@dataclass(frozen=True)
class FoldBn:
    """Fold batch norms into the convolutions and linear layers before them."""

    name = "fold-bn"
    needs = frozenset[str]()

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        graph = Graph.of(model, self.name)
        found = [
            (model.get_submodule(layer), model.get_submodule(norm))
            for norm in graph.calls
            if is_batch_norm(model.get_submodule(norm))
            and (layer := graph.source(norm)) is not None
            and of_one_axis(model.get_submodule(layer), model.get_submodule(norm), stats.get(layer, Stats()).num_axes)
        ]
        if not found:
            raise ModelError(
                f"fold-bn: {type(model).__name__} has no batch norm that follows a convolution directly, and none that "
                f"calibration data shows to follow a linear layer on [example, channel]; leave fold-bn out"
            )
        for source, reader in found:
            fold(source, reader)


def of_one_axis(layer: nn.Module, norm: nn.Module, num_axes: int | None) -> bool:
    """True if a batch norm's channels are the outputs of the layer before it, whose input has so many axes."""
    if isinstance(layer, nn.Linear):
        return type(norm) is nn.BatchNorm1d and num_axes == 2
    return AXES.get(type(layer)) is type(norm) and num_axes in (None, len(layer.kernel_size) + 2)  # type: ignore[arg-type]


def fold(layer: nn.Module, norm: nn.Module) -> None:
    """`gain (y - mean) / sqrt(var + eps) + bias`, as far as it goes as a weight and a bias of the layer."""
    weight, gain, offset = parameter(layer, "weight"), parameter(norm, "weight"), parameter(norm, "bias").double()
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    eps: float = norm.eps  # type: ignore[assignment]
    factor = gain.double() / (var.double() + eps).sqrt()
    set_parameter(layer, "weight", weight.double() * factor.view(-1, *[1] * (weight.dim() - 1)))
    offset = offset - mean * factor
    if layer.bias is not None:
        set_parameter(layer, "bias", parameter(layer, "bias") * factor + offset)
        offset = torch.zeros_like(offset)
    set_parameter(norm, "bias", offset)
    set_parameter(norm, "weight", torch.ones_like(gain))
    norm.register_buffer("running_mean", torch.zeros_like(mean))
    norm.register_buffer("running_var", torch.full_like(var, 1 - eps))


def is_neutral(norm: nn.Module) -> bool:
    """True if a batch norm only adds its bias, as it does after folding."""
    eps: float = norm.eps  # type: ignore[assignment]
    mean, var, gain = norm.get_buffer("running_mean"), norm.get_buffer("running_var"), parameter(norm, "weight")
    return not mean.any() and all_equal(var, 1 - eps) and all_equal(gain, 1.0)


def all_equal(values: Tensor, number: float) -> bool:
    """True if a tensor holds one number."""
    return torch.equal(values, torch.full_like(values, number))
