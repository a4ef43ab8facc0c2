"""Calls a causal language model of transformers with its key/value cache.

transformers 5.24 renamed the argument and the output field from `past_key_values` to `cache`; earlier 5.x versions,
and models with code of their own, know the old name only. This is the one place that knows both.
"""

import inspect
from typing import Any

from torch import Tensor, nn


def cache_argument(model: nn.Module) -> str:
    """The name under which `model.forward` takes its cache: "cache" or "past_key_values".

    >>> class New(nn.Module):
    ...     def forward(self, input_ids, cache=None): ...
    >>> cache_argument(New()), cache_argument(nn.Linear(1, 1))
    ('cache', 'past_key_values')
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def call_with_cache(model: nn.Module, cache: Any, **inputs: Tensor) -> tuple[Tensor, Any]:
    """Run the model on `inputs` after what `cache` has seen; None starts a new cache.

    Returns the logits `[batch, new tokens, vocabulary]` and the cache that now holds these tokens as well. Raises
    what the model raises: the caller knows that it generates text.
    """
    outputs = model(**inputs, **{cache_argument(model): cache}, use_cache=True)
    return outputs.logits, outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
