"""Language models with the key/value cache as inputs and outputs: the past comes in, past and new tokens go out.

Names are those that ONNX Runtime's, optimum's and transformers.js's generation loops use:

    input_ids [batch, sequence], attention_mask [batch, total_sequence], position_ids [batch, sequence],
    past_key_values.N.key and .value [batch, heads, past_sequence, size]
    to logits [batch, sequence, vocabulary], present.N.key and .value [batch, heads, total_sequence, size]

A first call has a past of length 0. Texts of different lengths are padded on the left, by zeros in the attention mask.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.nn.cached_call import call_with_cache

NEW = ("input_ids", "attention_mask", "position_ids")
PAST, PRESENT = "past_key_values", "present"
AXES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "total_sequence"},
    "position_ids": {0: "batch", 1: "sequence"},
}
PAST_AXES = {0: "batch", 2: "past_sequence"}
NUM_ROWS, NUM_PAST, NUM_NEW = 3, 9, 5  # of the example inputs


class Decoded(NamedTuple):
    """The outputs of one call of a language model with a cache.

    Attributes:
        outputs: logits, and the keys and values of each layer, `present.N.key`, by name.
    """

    outputs: dict[str, Tensor]


def has_cache(model: nn.Module) -> bool:
    """True if the model generates text with a cache of just one key and one value per layer and token.

    Its attention must be looked up in transformers' table of attention functions, where the export puts its own.
    """
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if config is None or can_generate is None or not can_generate() or getattr(config, "is_encoder_decoder", False):
        return False
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    return bool(layers) and {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def cached_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The inputs of a call that reads the last tokens of some texts, with the cache of all before.

    Args:
        ids, mask: `[row, token]`, padded on the left; the last `NUM_NEW` tokens are new.
    """
    num_past = ids.shape[1] - NUM_NEW
    positions = positions_of(mask)
    first = {
        "input_ids": ids[:, :num_past],
        "attention_mask": mask[:, :num_past],
        "position_ids": positions[:, :num_past],
    }
    with torch.no_grad():
        made = call_cached(model, first).outputs
    past = {name.replace(PRESENT, PAST, 1): tensor for name, tensor in made.items() if name.startswith(PRESENT)}
    new = {"input_ids": ids[:, num_past:], "attention_mask": mask, "position_ids": positions[:, num_past:]}
    return new | past


def positions_of(mask: Tensor) -> Tensor:
    """The position of every token in its text, `[row, token]`, from a padding mask; 0 for padding.

    >>> positions_of(torch.tensor([[0, 0, 1, 1]]))
    tensor([[0, 0, 0, 1]])
    """
    return (mask.cumsum(-1) - 1).clamp(min=0)


def call_cached(model: nn.Module, inputs: Mapping[str, Tensor]) -> Decoded:
    """Run the model on `inputs`, which hold the past keys and values of its cache."""
    from transformers import DynamicCache

    keys = [tensor for name, tensor in inputs.items() if name.startswith(PAST) and name.endswith(".key")]
    values = [tensor for name, tensor in inputs.items() if name.startswith(PAST) and name.endswith(".value")]
    cache = DynamicCache(list(zip(keys, values, strict=True)))
    logits, cache = call_with_cache(model, cache, **{name: inputs[name] for name in NEW})
    present: dict[str, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer.keys, Tensor) or layer.keys.dim() != 4:
            raise InputError(
                f"{type(model).__name__} keeps no keys and values in layer {number}; "
                f"export it without a cache: --no-cache"
            )
        present |= {f"{PRESENT}.{number}.key": layer.keys, f"{PRESENT}.{number}.value": layer.values}
    return Decoded({"logits": logits, **present})


def axes_of(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The axes of each input that may have any size, by position, with their names."""
    return {name: dict(AXES.get(name, PAST_AXES)) for name in inputs}
