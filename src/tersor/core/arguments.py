"""The check of arguments of the public functions, before anything is done with them: what each may be, by its name."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from os import PathLike
from typing import Any, NamedTuple, ParamSpec, TypeVar

from tersor.core.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")


class Rule(NamedTuple):
    """The words for the valid values of an argument, and the test of one."""

    wanted: str
    holds: Callable[[Any], bool]


def is_path(value: Any) -> bool:
    """True for a string or a path."""
    return isinstance(value, str | PathLike)


def has(*names: str) -> Callable[[Any], bool]:
    """A test for an object of a kind that has one of these attributes."""
    return lambda value: any(hasattr(value, name) for name in names) and not isinstance(value, type)


def is_whole(value: Any) -> bool:
    """True for a whole number."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def several(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for a list or tuple of such values."""
    return lambda value: isinstance(value, Iterable) and not isinstance(value, str | bytes) and all(map(of, value))


def is_name(value: Any) -> bool:
    """True for what can stand in a list of names."""
    return value is not None and not isinstance(value, int | float)


def one_or(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for one such value, or several."""
    return lambda value: (test(value) and not isinstance(value, list | tuple)) or several(test)(value)


PATH = Rule("the path of a file or folder, as a string or a Path", is_path)
TASK = Rule(
    "the name of a task, or a task of your own",
    lambda value: is_path(value) or has("prepare")(value),
)
NAMES = Rule("a name or a list of names", lambda value: isinstance(value, str) or several(is_name)(value))
NUMBERS = Rule("a whole number or a list of them", one_or(is_whole))
WHOLE = Rule("a whole number", is_whole)
MAPPING = Rule('a mapping, such as {"name": value}', lambda value: isinstance(value, Mapping))
FUNCTION = Rule("a function", callable)
AMOUNT = Rule('a number or a string, such as 0.01 or "8 MB"', lambda value: isinstance(value, str | int | float))

RULES: dict[str, Rule] = {
    **dict.fromkeys(("output", "folder", "artifact"), PATH),
    **dict.fromkeys(("weights", "calibration", "train", "save_base"), PATH),
    "data": Rule(
        "the path of a file or folder; examples in memory go into a task of your own",
        lambda value: is_path(value) or has("task")(value),
    ),
    "task": TASK,
    "recipe": Rule(
        "a Recipe, the path of its YAML file, or the name of a scheme",
        lambda value: is_path(value) or has("steps")(value),
    ),
    **dict.fromkeys(("formats", "exclude", "transforms", "runtime", "fixed"), NAMES),
    **dict.fromkeys(("batch_sizes", "threads"), NUMBERS),
    **dict.fromkeys(("seed", "num_threads"), WHOLE),
    **dict.fromkeys(("rules", "options", "task_options", "lora"), MAPPING),
    **dict.fromkeys(("size", "ratio", "drop"), AMOUNT),
    **dict.fromkeys(("on_progress", "on_trial", "on_step", "on_note"), FUNCTION),
    "shape": Rule("a list of whole numbers, such as [1, 3, 224, 224]", several(is_whole)),
    "to": Rule("the name of a client, such as 'onnx'", lambda value: isinstance(value, str)),
    "models": Rule("one model or more", bool),
}


def checked(**own: Rule) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that raises InputError for an argument that is not what `RULES`, or a function's `own` rules, say.

    None passes where it is the default, and for keywords that go to a group of settings.

    >>> checked()(lambda seed: seed)("one")
    Traceback (most recent call last):
    tersor.core.errors.InputError: seed='one' is of type str; give a whole number
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            more = given.pop("more", {})
            optional = {name for name, each in signature.parameters.items() if each.default is None} | set(more)
            for name, value in {**more, **given}.items():
                check(name, value, {**RULES, **own}.get(name), name in optional)
            return function(*args, **kwargs)

        return call

    return decorate


def check(name: str, value: Any, rule: Rule | None, optional: bool) -> None:
    """Raises InputError if a value is not what the rule for it says."""
    if rule is None or (optional and value is None) or rule.holds(value):
        return
    shown = f"{value!r:.60}" if isinstance(value, str | int | float | list | tuple | dict) or value is None else "..."
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    of_type = f"the class {kind}" if isinstance(value, type) else f"of type {kind}"
    raise InputError(f"{name}={shown} is {of_type}; give {rule.wanted}")
