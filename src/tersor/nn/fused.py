"""PyTorch's fused inference path of nn.TransformerEncoder, which packed weights cannot take.

It reads float weights around its modules. It also leaves out the padding of its inputs, whose outputs are zeros then:
what averages over all positions counts on that, so the outputs are zeros without it as well.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def leave_fused_path(model: nn.Module) -> list[Callable[[], None]]:
    """Have every nn.TransformerEncoder and its layers call their modules, and give what they gave before.

    Returns the calls that put the model back as it was.
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            undo.append(partial(setattr, module, "activation_relu_or_gelu", module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            undo.append(partial(setattr, module, "use_nested_tensor", True))
            module.use_nested_tensor = False
            undo.append(module.layers[-1].register_forward_hook(zero_padding, with_kwargs=True).remove)
    return undo


@contextmanager
def without_fused_path(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs as after `leave_fused_path`; it is left as it was, so nothing may be packed inside."""
    undo = leave_fused_path(model)
    try:
        yield
    finally:
        for call in undo:
            call()


def zero_padding(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    """The outputs of an encoder's last layer, with zeros where PyTorch's fused path gives zeros: in eval mode and
    without gradients, for a batch whose padding follows its tokens, without any other mask."""
    padding: Tensor | None = kwargs.get("src_key_padding_mask")
    if padding is None or kwargs.get("src_mask") is not None or output.dim() != 3 or torch.compiler.is_compiling():
        return output
    tensors = [output, *layer.parameters()]
    follows = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if layer.training or follows or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
        return output
    kept = padding.logical_not()
    if not torch._nested_tensor_from_mask_left_aligned(output, kept):
        return output
    return output.masked_fill(~kept.unsqueeze(-1), 0.0)
