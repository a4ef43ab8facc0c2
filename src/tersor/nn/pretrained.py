"""The methods of a transformers model that read or write all weights, made safe once some weights are packed.

`save_pretrained` would write a folder whose weights transformers does not find, and draws at random: an artifact is
written in its place. Ties and rows of a packed embedding are not for transformers to change.
"""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from tersor.core.errors import InputError
from tersor.nn.packed import packed_weight
from tersor.nn.sites import find_sites


def guard(model: nn.Module, write: Callable[[nn.Module, Path], None]) -> None:
    """Have a model that may hold packed weights refuse what would break them, or leave them as they are.

    Args:
        write: writes the model into a folder, in the place of its `save_pretrained`, while a weight is packed.
    """

    def save_pretrained(
        self: Any, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **options: Any
    ) -> Any:
        is_packed_now = any(is_packed(self, site.parameter) for site in find_sites(self))
        if not is_packed_now or getattr(self, "_hf_peft_config_loaded", False):  # of adapters, they alone are written
            return type(self).save_pretrained(self, save_directory, *args, push_to_hub=push_to_hub, **options)
        write(self, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), **options)
        return None

    for method in (save_pretrained, tie_weights, resize_token_embeddings):
        if hasattr(type(model), method.__name__):
            setattr(model, method.__name__, MethodType(method, model))


def tie_weights(self: Any, *args: Any, **options: Any) -> Any:
    """Tie weights as transformers does, unless one of them is packed: that one is tied already."""
    tied = getattr(self, "all_tied_weights_keys", None) or {}
    if any(is_packed(self, name) for pair in tied.items() for name in pair):
        return None
    return type(self).tie_weights(self, *args, **options)


def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    """Resize the embedding as transformers does. Raises InputError where it, or the head, is packed."""
    layers = [layer for layer in (self.get_input_embeddings(), self.get_output_embeddings()) if layer is not None]
    if new_num_tokens is not None and any(packed_weight(layer, "weight") is not None for layer in layers):
        raise InputError(
            f"resize_token_embeddings({new_num_tokens}): the embedding is packed, and has the rows it has; give the "
            f"model its tokens before it is compressed"
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, *args, **options)


def is_packed(model: nn.Module, name: str) -> bool:
    """True if something stands in the place of a parameter, given by its full name."""
    owner, _, parameter = name.rpartition(".")
    try:
        return packed_weight(model.get_submodule(owner), parameter) is not None
    except AttributeError:  # ties are named by patterns in some models
        return False
