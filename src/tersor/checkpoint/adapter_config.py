"""peft's `adapter_config.json`, read here and not by peft: a downloaded file may name modules to import, patterns that
never end and sizes beyond all memory. What is known is checked and handed on; what would change the result and is not
known is refused; all else stays behind.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor

from tersor.core.errors import ModelError
from tersor.core.messages import first_line, first_mistake

PREFIX = "base_model.model."
FACTOR = re.compile(r"\.lora_(?:embedding_)?A(?:\.|$)")
MOST_RANK, MOST_NAMES = 2**16, 2**16
LARGEST = 2**24  # bytes of the file
REFUSED = (  # what would change what the factors mean, or what they are put into
    *(
        "megatron_config",
        "layer_replication",
        "use_qalora",
        "use_bdlora",
        "target_parameters",
        "alora_invocation_tokens",
    ),
    *("trainable_token_indices", "arrow_config", "velora_config", "monteclora_config", "kasa_config", "lora_bias"),
)

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[\w.\-]+$")]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^\^?[\w.\-]+\$?$")]
Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
Alpha = Annotated[int | float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Start = Annotated[str, StringConstraints(pattern=r"^(gaussian|olora|orthogonal|pissa(_niter_[0-9]{1,4})?)$")]


class Settings(BaseModel):
    """The settings that are handed on to peft."""

    model_config = ConfigDict(strict=True, extra="ignore")

    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[int | float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    inference_mode: bool = False
    init_lora_weights: bool | Start = True
    modules_to_save: Annotated[list[Name], Field(max_length=MOST_NAMES)] | None = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=MOST_NAMES)] = {}
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=MOST_NAMES)] = {}
    task_type: (
        Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"] | None
    ) = None


def read_settings(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of peft's `LoraConfig` for a file and the factors beside it, whose names say what is adapted.

    Raises:
        ModelError: it cannot be read, is no LoRA, or says what is not known here.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        kind = content["peft_type"]
        if kind != "LORA":
            raise ModelError(f"{path.parent}: an adapter of type {str(kind)[:40]}, and only LORA can be merged")
        settings = Settings.model_validate_json(text).model_dump()
    except ValidationError as error:
        raise ModelError(f"{path}: {first_mistake(error)}") from None
    except KeyError as error:
        raise ModelError(f"{path}: has no {error.args[0]}; save the adapter again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)}); save the adapter again") from None
    unknown = [name for name in REFUSED if content.get(name)]
    if unknown:
        raise ModelError(f"{path}: {unknown[0]} is set, which tersor does not merge; train a plain LoRA")
    largest = max((min(tensor.shape) for name, tensor in tensors.items() if FACTOR.search(name)), default=0)
    if settings["r"] > max(1, largest) and not settings["rank_pattern"]:
        raise ModelError(f"{path}: r is {settings['r']}, and the factors have a rank of {largest} at most")
    return settings | {"target_modules": targets_of(path, tensors)}


def targets_of(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that have factors, whatever pattern the file has for them.

    >>> targets_of(Path("adapter"), {"base_model.model.layers.0.up.lora_A.weight": None})
    ['layers.0.up']
    """
    found = {FACTOR.split(name)[0].removeprefix(PREFIX) for name in tensors if FACTOR.search(name)}
    odd = [name for name in sorted(found) if not re.fullmatch(r"[\w.\-]+", name)]
    if odd or not found:
        what = f"factors for {odd[0][:80]!r}" if odd else "no factors (lora_A)"
        raise ModelError(f"{path.parent}: the tensors hold {what}; save the adapter again")
    return sorted(found)
