"""The kind of input that a Hugging Face model takes, found from its configuration and its class's signature."""

import inspect
from typing import Any, Literal

from tersor.core.errors import InputError

Takes = Literal["text", "images", "images and text", "waves", "features"]
IMAGES, TEXT = "pixel_values", "input_ids"
NAMES: dict[str, Takes] = {IMAGES: "images", "input_values": "waves", "input_features": "features", TEXT: "text"}
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # they read text alone, too


def takes(config: Any) -> Takes:
    """The kind of input that an architecture takes; `text` if nothing says otherwise."""
    parameters, main = signature_of(config)
    needed = [name for name, each in parameters.items() if each.default is each.empty]
    if IMAGES in parameters and TEXT in parameters:
        reads_alone = architecture_of(config).endswith(GENERATES) and IMAGES not in needed
        return "text" if reads_alone else "images and text"
    return NAMES.get(main, "text")


def signature_of(config: Any) -> tuple[dict[str, inspect.Parameter], str]:
    """The parameters of the class's forward, and the name of its main input."""
    import transformers

    found = getattr(transformers, architecture_of(config), None) if config is not None else None
    if found is None and config is not None:
        table = transformers.models.auto.modeling_auto.MODEL_MAPPING
        found = table.get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    if found is None or not hasattr(found, "main_input_name"):
        return {}, TEXT
    return dict(inspect.signature(found.forward).parameters), found.main_input_name


def architecture_of(config: Any) -> str:
    """The first architecture that a configuration names; empty without one."""
    names = getattr(config, "architectures", None) or [""]
    return str(names[0])


def refuse_encoder_decoder(config: Any, task: str) -> None:
    """Raises InputError for a model that also needs decoder inputs, which no task feeds yet."""
    if getattr(config, "is_encoder_decoder", False):
        name = architecture_of(config) or type(config).__name__
        raise InputError(
            f"{name} is an encoder-decoder model, which also needs decoder inputs: task {task} feeds language models, "
            f"encoders, classifiers, and models of images and sound; write your own task and name it "
            f"package.module:factory, or load the encoder alone"
        )


def part_of(config: Any, name: str) -> Any:
    """The configuration of a part (`text_config`, `vision_config`) where there is one, else the whole."""
    part = getattr(config, name, None)
    return config if part is None else part
