"""Finds the axis of a model's output that holds the classes.

A convolution gives `[example, class, height, width]`, a linear layer `[example, position, class]`, and either may be
transposed, resized or put through a softmax afterwards. Shapes do not tell, so the model is asked: one channel of its
last layer is raised on one batch, and the axis along which only one slice of the output rises is the axis of the
classes. Nothing is changed in the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NUM_LAYERS = 8  # the last ones that ran, tried from the end
CHANNELS_AXIS = {"out_channels": 1, "out_features": -1, "nf": -1}  # how layers call their number of outputs


def find_class_axis(model: nn.Module, run: Any, before: Tensor) -> int | None:
    """The axis of classes in `before`, which `run()` gives again; None where the model does not show it.

    Args:
        run: runs the model on the same batch and gives the same tensor.
    """
    wide = [axis for axis in range(1, before.ndim) if before.shape[axis] > 1]
    if len(wide) == 1:
        return wide[0]
    order: list[nn.Module] = []
    with watched(model, order):
        run()
    for layer in list(dict.fromkeys(reversed(order)))[:NUM_LAYERS]:
        for channel in sorted({0, num_channels(layer) - 1}):
            with raised(layer, channel):
                risen = rises(before, run())
            if not risen.any():
                continue
            confined = [axis for axis in wide if int(along(risen, axis).sum()) == 1]
            if len(confined) == 1:
                return confined[0]
            if not confined:
                return None
    return None


def num_channels(layer: nn.Module) -> int:
    """The number of outputs of a layer with weights; 0 for any other module."""
    sizes = (getattr(layer, name, 0) for name in CHANNELS_AXIS)
    return next((size for size in sizes if isinstance(size, int) and size > 0), 0)


@contextmanager
def watched(model: nn.Module, order: list[nn.Module]) -> Iterator[None]:
    """Inside, the layers of weights that run are noted in the order they do."""
    layers = [module for module in model.modules() if num_channels(module) and not list(module.children())]
    hooks = [layer.register_forward_hook(lambda module, args, output: order.append(module)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def raised(layer: nn.Module, channel: int) -> Iterator[None]:
    """Inside, one output channel of the layer is far above what it was."""
    axis = next(axis for name, axis in CHANNELS_AXIS.items() if isinstance(getattr(layer, name, None), int))

    def raise_channel(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
            return output
        changed = output.clone()
        most = torch.finfo(output.dtype).max / 4  # float16 ends early
        changed.select(axis, channel).add_(min(10 * output.float().abs().max().item() + 1, most))
        return changed

    hook = layer.register_forward_hook(raise_channel)
    try:
        yield
    finally:
        hook.remove()


def rises(before: Tensor, after: Tensor) -> Tensor:
    """A mask of the outputs that have become larger, beyond rounding."""
    before, after = before.float(), after.float().nan_to_num(0.0, 1e30, -1e30)
    return after - before > 1e-3 * (after - before).abs().max().clamp_min(1e-30)


def along(risen: Tensor, axis: int) -> Tensor:
    """A bool `[size of the axis]`: true where the slice along the axis has any true element."""
    return torch.movedim(risen, axis, 0).flatten(1).any(1)
