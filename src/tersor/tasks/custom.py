"""A user's own task, named `package.module:factory`."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError
from tersor.tasks.contract import Task

MEMBERS = ("name", "output", "description", "fingerprint", "prepare", "batches", "forward", "score")
OUTPUTS = ("logits", "embedding", "values")


def open_custom(name: str, data: Path | None) -> Task:
    """Import the factory (the current folder is searched too), call it, with `data=` if given, and check what it made.

    What the user's own code raises is not caught: its traceback says where.
    """
    task: Any = _find(name)(**({} if data is None else {"data": data}))
    missing = [member for member in MEMBERS if not hasattr(task, member)]
    if missing:
        raise InputError(
            f"{name} made a {type(task).__name__} without {', '.join(missing)}; a task has {', '.join(MEMBERS)} "
            f"(see tersor.tasks.contract)"
        )
    if task.output not in OUTPUTS:
        raise InputError(f"{name}: output is {task.output!r}; expected one of {', '.join(OUTPUTS)}")
    for member in MEMBERS[4:]:
        if not callable(getattr(task, member)):
            raise InputError(f"{name}: {member} is a {type(getattr(task, member)).__name__}; expected a method")
    return task


def _find(name: str) -> Any:
    module_name, _, factory_name = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"task '{name}': no module '{error.name}'; run from its folder or install it") from None
    except (ValueError, TypeError):
        raise InputError(f"task '{name}': expected package.module:factory") from None
    finally:
        sys.path.remove(folder)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module_name]
        here = [value.__name__ for value in own if inspect.isroutine(value) or inspect.isclass(value)]
        raise InputError(
            f"task '{name}': {module_name} has no callable '{factory_name}'; it has {', '.join(here) or 'none'}"
        )
    return factory
