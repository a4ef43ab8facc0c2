"""The options tasks take: what each means, and what its value must be. Defaults are in the tasks' signatures."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from tersor.core.errors import InputError

HELP = {
    "batch_size": "examples a forward pass (32 texts, 128 images, 4 windows)",
    "max_length": "tokens a text is cut to",
    "context": "tokens a window",
    "stride": "tokens between the starts of windows (default: the context)",
    "max_tokens": "use only the first tokens of the text",
    "image_size": "resize the shorter side to this and crop the centre square",
    "mean": "subtracted from pixels on the [0, 1] scale: one number or one per channel",
    "std": "what pixels are then divided by: one number or one per channel",
    "output": "how outputs are judged: logits, embedding or values (default: as the model shows it)",
    "field": "which of several outputs is judged, by name or number (default: all)",
    "class_axis": "which axis of the outputs holds the classes, 1 being the first after the examples",
    "augment": "what is done to images in training: flip, shift, or both as flip,shift",
    "max_examples": "evaluate a random subset of this many",
    "calibration_examples": "examples for calibration, at most",
}
NUMBERS = ("mean", "std")
NAMES = ("augment", "output", "field")


def check_options(task: str, options: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """The options with their values checked: whole numbers from 1, for mean and std one number or
    several, or names."""
    for name in options:
        if name not in known:
            raise InputError(f"task '{task}' has no option '{name}'; it takes {', '.join(known)}")
    given = {name: value for name, value in options.items() if value is not None}
    return {name: check_of(name)(name, value) for name, value in given.items()}


def check_of(name: str) -> Callable[[str, Any], Any]:
    """The check of an option's value; names are checked by the task that knows them."""
    if name in NAMES:
        return lambda name, value: value
    return _numbers if name in NUMBERS else _count


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"option {name} is {value!r}; expected a whole number from 1 ({HELP[name]})")
    return value


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise InputError(f"option {name} is {value!r}; expected a number or a list of them ({HELP[name]})")
        if name == "std" and number <= 0:
            raise InputError(f"option std is {value!r}; expected numbers above 0")
    if not values:
        raise InputError(f"option {name} is an empty list; expected a number or one per channel")
    return tuple(float(number) for number in values) if isinstance(value, list | tuple) else float(value)
