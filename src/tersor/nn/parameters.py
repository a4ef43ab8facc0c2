"""Parameters of a module as values: read detached, and replaced by new ones of the same type."""

from jaxtyping import Float
from torch import Tensor, nn

from tersor.nn.sites import is_transposed_linear


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter's values."""
    return module.get_parameter(name).detach()


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one of its own type; the old one, which another model may use, is left alone."""
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))


def matrix(linear: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear layer."""
    weight = parameter(linear, "weight")
    return weight.t() if is_transposed_linear(linear) else weight


def set_matrix(linear: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Replace the weight of a linear layer."""
    set_parameter(linear, "weight", weight.t() if is_transposed_linear(linear) else weight)
