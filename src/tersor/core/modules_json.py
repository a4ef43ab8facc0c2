"""The modules of a sentence-transformers folder: `modules.json` lists them, some with a subfolder of their own."""

import json
from pathlib import Path
from typing import Any

from tersor.core.errors import ModelError

MODULES = "modules.json"


def listed(folder: Path) -> list[tuple[str, str]]:
    """The modules of a folder, in order: the last part of each one's type, and its own subfolder. Empty without a list.

    Raises ModelError where the list is none.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    found = []
    for module in read_json(path, list):
        place = module.get("path", "") if isinstance(module, dict) else None
        if not isinstance(place, str) or Path(place).is_absolute() or ".." in Path(place).parts:
            raise ModelError(f"{path}: {module!r} is no module; expected sentence-transformers' list of type and path")
        found.append((str(module.get("type", "")).rpartition(".")[2], place))
    return found


def module_folders(folder: Path) -> list[Path]:
    """The subfolders, relative to the folder, whose weights belong to the model besides its transformer."""
    return [Path(place) for kind, place in listed(folder) if place and kind != "Transformer"]


def read_json(path: Path, kind: type) -> Any:
    """The content of a sentence-transformers file. Raises ModelError if it is not of that kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, kind):
        what = "object" if kind is dict else "list"
        raise ModelError(f"{path}: not a JSON {what}; expected sentence-transformers' configuration")
    return content
