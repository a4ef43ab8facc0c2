"""Shared parts of the exports by `torch.export`: a model without caches and fused attention, and the layer that an
operator belongs to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tersor.exporters.examples import Examples


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Language models compute all positions, and return no keys and values; attention is written out, which runtimes
    fuse better than what becomes of the operator."""
    config = getattr(model, "config", None)
    wanted = {"use_cache": False, "_attn_implementation": "eager", "_experts_implementation": "batched_mm"}
    before = {name: getattr(config, name) for name in wanted if getattr(config, name, None) is not None}
    for name in before:
        setattr(config, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def slow_attention() -> Iterator[None]:
    """nn.TransformerEncoder and nn.MultiheadAttention leave their fused inference path, which no file format has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def layer_of(operator: str, model: nn.Module, examples: Examples) -> str:
    """The layers that run an operator (`aten.fft_fft.default`), by their path; found by running the model once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    stack: list[str] = []
    found: list[str] = []
    name = operator.split(".")[1]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == name and stack and stack[-1] not in found:
                found.append(stack[-1])
            return func(*args, **(kwargs or {}))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, path=path: stack.append(path)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.no_grad(), Watch():
            examples.call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return " and ".join(path or type(model).__name__ for path in found[:3]) or "the model"
