"""The types that a model's numbers have: computing in others for a while, and giving back those that came."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Dtypes = Mapping[str, torch.dtype]


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every float parameter and buffer, under every name it has."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}


def set_types(model: nn.Module, kinds: Dtypes) -> None:
    """Give parameters and buffers these dtypes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in kinds:
            tensor.data = tensor.data.to(kinds[name])


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the model computes in `dtype`; afterwards its numbers have the types they had. None changes nothing."""
    if dtype is None:
        yield
        return
    kinds = types_of(model)
    model.to(dtype)
    try:
        yield
    finally:
        set_types(model, kinds)
