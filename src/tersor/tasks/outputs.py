"""Model outputs of any structure, and the choice of the tensors in them that are judged.

logits     one tensor whose classes are put last: agreement and KL
embedding  one vector of unit length an example: cosine
values     everything else (several outputs, images, regressions): how much of the original's variance is explained

A model's `logits` are judged where it has them; of several outputs all are, as values. Hidden states count only where
there is nothing else, and are then averaged over positions to an embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from tersor.core.errors import InputError
from tersor.tasks.contract import Output

LOGITS = ("logits", "out")  # transformers, and torchvision's segmentation
EMBEDDINGS = (("image_embeds", "text_embeds"), ("sentence_embedding",))
HIDDEN = "last_hidden_state"
INSIDE = (  # what models return beside their answer
    *("loss", "loss_dict", "past_key_values", "router_logits", "mems", "aux", "auxiliary_outputs", "pooler_output"),
    *("mask", "ids_restore", "extract_features", "init_reference_points"),
)
INSIDE_ENDS = ("hidden_state", "hidden_states", "attentions", "model_output", "reference_points")

STATES = ("embeds", "embeddings", "pooled_output")  # beside logits no answer


def tensors_of(output: Any, place: str = "") -> dict[str, Tensor]:
    """All floating-point tensors in what a model returned, by where they stand: `logits`, `0`, `boxes.1`.

    >>> list(tensors_of({"a": torch.ones(1), "b": (torch.ones(1), [torch.ones(1)])}))
    ['a', 'b.0', 'b.1.0']
    """
    if isinstance(output, Tensor):
        return {place: output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        inside = output.items()
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        inside = dict(zip(output._fields, output, strict=True)).items()
    elif isinstance(output, tuple | list):
        inside = dict(enumerate(output)).items()
    elif is_dataclass(output) and not isinstance(output, type):
        inside = {each.name: getattr(output, each.name) for each in fields(output)}.items()
    else:
        return {}
    found: dict[str, Tensor] = {}
    for name, value in inside:
        found |= tensors_of(value, f"{place}.{name}" if place else str(name))
    return found


def logits_of(output: Any) -> Float[Tensor, "..."]:
    """The logits in what a model returned: a tensor, `logits` by name, or a tuple's first tensor."""
    if isinstance(output, Tensor):
        return output
    found = tensors_of(output)
    for name in LOGITS:
        if name in found:
            return found[name]
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    holds = f" (it holds {', '.join(found)})" if found else ""
    raise InputError(
        f"the model returned {type(output).__name__}{holds}, and no logits: this task needs a model with a prediction "
        f"head (a classifier or a language model); what other models return is compared by task fidelity"
    )


def check_classes(logits: Tensor, num_needed: int = 2) -> None:
    """Tell a model with too few outputs apart from a model that is wrong."""
    if logits.ndim < 2 or logits.shape[-1] < num_needed:
        raise InputError(
            f"the model gives outputs of shape {list(logits.shape)}; expected [example, class] with at least "
            f"{num_needed} classes; for other outputs write your own task and name it package.module:factory"
        )


def one_class_each(logits: Tensor) -> Float[Tensor, "row class_"]:
    """Logits of one prediction an example; further axes may only be of size 1, as a convolutional head leaves them."""
    flat = (
        logits.flatten(1) if logits.ndim > 2 and logits.numel() == logits.shape[0] * max(logits.shape[1:]) else logits
    )
    if flat.ndim != 2:
        raise InputError(
            f"the model gives logits {list(logits.shape)}; expected [example, class]; for a prediction at every place "
            f"use task fidelity, or write your own task and name it package.module:factory"
        )
    return flat


@dataclass(frozen=True)
class Reading:
    """The way outputs are read: chosen once, on the original, and then used for every model.

    Attributes:
        names: the tensors that are judged, as `tensors_of` names them.
        class_axis: the axis of logits that holds the classes; it is moved to the end.
        scales: divisors of the outputs, if there are several, so that all weigh alike.
        probabilities: the model gives probabilities, and their logarithm is taken.
        note: a sentence on all this for the report.
    """

    output: Output
    names: tuple[str, ...]
    class_axis: int = -1
    scales: tuple[float, ...] = (1.0,)
    probabilities: bool = False
    note: str = ""

    def __call__(self, output: Any, mask: Tensor | None = None) -> Tensor:
        """Logits `[example, ..., class]`, or rows `[example, value]`. Raises InputError where a model returns other
        tensors than the original did."""
        found = tensors_of(output)
        missing = [name for name in self.names if name not in found]
        if missing:
            raise InputError(f"the original returned {', '.join(missing)}, and this model only {', '.join(found)}")
        chosen = [found[name] for name in self.names]
        if self.output == "logits":
            last = chosen[0].movedim(self.class_axis, -1)
            return last.float().clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else last
        if self.output == "embedding":
            return unit(torch.cat([normalize(pooled(each.float(), mask), dim=-1) for each in chosen], -1))
        rows = [without_padding(each.float(), mask).reshape(len(each), -1) for each in chosen]
        return torch.cat([row / scale for row, scale in zip(rows, self.scales, strict=True)], -1)


def unit(rows: Float[Tensor, "row value"]) -> Float[Tensor, "row value"]:
    """The rows scaled to unit length."""
    return normalize(rows, dim=-1)


def pooled(hidden: Tensor, mask: Tensor | None = None) -> Float[Tensor, "row dim"]:
    """One vector an example: the mean over positions `[row, position, dim]` or places `[row, dim, height, width]`."""
    if hidden.ndim == 3 and mask is not None and mask.shape == hidden.shape[:2]:
        weights = mask.unsqueeze(-1).to(hidden)
        return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
    if hidden.ndim == 3:
        return hidden.mean(1)
    return hidden.flatten(2).mean(-1) if hidden.ndim > 3 else hidden


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values with zeros wherever a position is padding."""
    if mask is None or values.ndim < 2 or mask.shape != values.shape[:2]:
        return values
    return values * mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values)


def judged_names(output: Any, num_examples: int) -> tuple[tuple[str, ...], Output | None]:
    """Names of the output tensors that are judged, and their kind if the names show it, else None."""
    found = {name: each for name, each in tensors_of(output).items() if each.ndim and len(each) == num_examples}
    if not found:
        raise InputError(
            f"the model returned {described(output)} for {num_examples} examples: no tensor whose first axis is the "
            f"examples; write your own task and name it package.module:factory"
        )
    for names in EMBEDDINGS:
        if all(name in found for name in names):
            return names, "embedding"
    answers = [name for name in found if not is_inside(name)]
    if "logits" in answers:
        answers = [name for name in answers if not name.startswith("decoder_output") and not name.endswith(STATES)]
    if answers == ["logits"] or (answers and answers[0] == "out"):
        return (answers[0],), "logits"
    if answers:
        return tuple(answers), None if len(answers) == 1 else "values"
    return ((HIDDEN,) if HIDDEN in found else tuple(found)), "embedding" if HIDDEN in found else "values"


def is_inside(name: str) -> bool:
    """True if a name is that of a state or a by-product rather than of an answer."""
    return any(part in INSIDE or part.endswith(INSIDE_ENDS) for part in name.split("."))


def described(output: Any) -> str:
    """A description of an output, by name and shape, for messages."""
    found = {name: list(each.shape) for name, each in tensors_of(output).items()}
    inside = ", ".join(f"{name} {shape}".strip() for name, shape in list(found.items())[:4])
    return inside if isinstance(output, Tensor) else f"{type(output).__name__} ({inside or 'no tensors'})"
