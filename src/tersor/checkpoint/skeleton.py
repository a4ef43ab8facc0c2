"""Models of the right class and shape that hold no weights yet: what packed and other tensors are put into."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tersor.checkpoint.guards import at_most, check_config, shapes_of
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.manifest import weights_path
from tersor.checkpoint.notice import remove
from tersor.checkpoint.source import quiet_transformers, transformers_class
from tersor.codecs.integers import EXPANSION
from tersor.core.errors import ArtifactError
from tersor.core.messages import first_line

FILES = "the weights files and a new head have"


def skeleton(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The Hugging Face model that an artifact holds, in eval mode: parameters on the meta device, buffers real.

    Raises ArtifactError for a custom model, whose code an artifact does not have, and a config that no model is built
    from.
    """
    if not (folder / "config.json").exists():
        raise ArtifactError(
            f"{folder}: holds a custom model ({manifest['model'].get('class')}); "
            f"pass a fresh instance: tersor.load({str(folder)!r}, model=YourModel())"
        )
    import transformers

    quiet_transformers()
    weights = weights_path(folder, manifest)
    try:
        check_config(folder, shapes_of([weights]))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        remove(config)
        config.architectures = [manifest["model"]["class"]]
        model_class = transformers_class(config)
        if model_class is transformers.AutoModel:
            raise ValueError(f"it has no class {manifest['model']['class']}")
        each, most = (EXPANSION, "can hold") if weights.name == CODED else (8, "has bits")
        model = without_weights(
            model_class, config, config.dtype, each * weights.stat().st_size, f"{weights.name} {most}"
        )
        if (folder / "generation_config.json").exists() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a garbled config trips over
        raise ArtifactError(f"{folder}: transformers cannot build the model: {first_line(error)}") from None
    return model


def without_weights(
    model_class: Any,
    config: Any,
    dtype: torch.dtype,
    num_weights: int,
    bound: str = "the weights files and a new head have",
) -> Any:
    """The model in eval mode: its parameters on the meta device, its buffers (rotary frequencies and the like) real.

    Args:
        num_weights: that it may have at most.
        bound: the file or setting that allows no more, for the message.

    Raises ValueError where it has more weights than it may.
    """
    from transformers.initialization import no_init_weights

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied one stays the same
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    with torch.device("meta"), at_most(num_weights, bound):
        model_class._from_config(config)
    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with no_init_weights():
            model = model_class._from_config(config, dtype=dtype)
    finally:
        hook.remove()
    model.tie_weights()
    return model.eval()
