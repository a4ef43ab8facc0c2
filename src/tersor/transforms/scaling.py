"""Move a factor for every feature from a module's outputs into the columns of the layers that read it."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.methods.stats import Stats
from tersor.nn.connections.connection import Connection, find_connections
from tersor.nn.connections.families import BY_TYPE
from tersor.nn.parameters import matrix, parameter, set_matrix, set_parameter
from tersor.nn.sites import is_linear


def scale(connection: Connection, model: nn.Module, factor: Float[Tensor, " features"]) -> None:
    """Divide the source's outputs by `factor`, multiply the readers' columns with it."""
    source = model.get_submodule(connection.source)
    factor = divide_rows(connection, source, factor) if is_linear(source) else divide_norm(connection, source, factor)
    for reader in map(model.get_submodule, connection.readers):
        weight = matrix(reader)
        set_matrix(reader, weight * connection.spread(factor, weight.shape[1]))


def divide_rows(connection: Connection, linear: nn.Module, factor: Tensor) -> Tensor:
    """Divide the outputs of a linear layer that are read; returns `factor`."""
    weight, first = matrix(linear).clone(), connection.part * len(factor)
    weight[first : first + len(factor)] /= factor.unsqueeze(1)
    set_matrix(linear, weight)
    if linear.bias is not None:
        bias = parameter(linear, "bias").clone()
        bias[first : first + len(factor)] /= factor
        set_parameter(linear, "bias", bias)
    return factor


def divide_norm(connection: Connection, norm: nn.Module, factor: Tensor) -> Tensor:
    """Divide a norm's outputs; returns the factor as the norm's rounded gain has it."""
    gain = parameter(norm, "weight").double() + connection.norm_offset
    set_parameter(norm, "weight", gain / factor - connection.norm_offset)
    new_gain = parameter(norm, "weight").double() + connection.norm_offset
    factor = torch.where(new_gain == 0, factor.double(), gain / new_gain)
    if getattr(norm, "bias", None) is not None:
        set_parameter(norm, "bias", parameter(norm, "bias") / factor)
    return factor


def require_connections(model: nn.Module, transform: str) -> list[Connection]:
    """All connections of a model. Raises ModelError if there are none."""
    found = find_connections(model)
    if not found:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ModelError(
            f"{transform}: {type(model).__name__} (model type {model_type}) has no layers whose inputs can be scaled; "
            f"known model types: {', '.join(sorted(BY_TYPE))}"
        )
    return found


def stats_of(connection: Connection, stats: Mapping[str, Stats]) -> Stats:
    """Statistics of the input that the readers of a connection share."""
    return next((stats[path] for path in connection.readers if path in stats), Stats())
