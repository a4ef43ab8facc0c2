"""Checks of an untrusted model folder before its files are opened: where links lead, and sizes in a config.

A link may stay inside the folder, or lead to the blobs of the hub cache that the folder is part of. A count of layers,
experts or labels makes transformers build as many things before a single tensor is read, so it is held against the
tensors that are there.
"""

import json
import math
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tersor.checkpoint.container import Container
from tersor.checkpoint.layout import CODED
from tersor.core.errors import InputError, ModelError
from tersor.core.messages import first_line
from tersor.core.pickled import is_pickle
from tersor.core.weights_file import opened, read_weights

COUNTED = re.compile(r"(layer|block|depth|stage|label|expert|head|group|codebook|channel|bin|level)s?(_count)?$")
FEW = 1024  # so many of anything are built in no time
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
SPARE = 2**24  # weights that a model may have beside those of its file: a new head


def named_path(name: str | Path) -> Path:
    """A path that the user named.

    Raises InputError if no file can have this name, or it may not be read, or it is a folder that holds a pipe.
    """
    try:
        path = Path(name).expanduser()
        inside = list(path.iterdir()) if path.is_dir() else []
        path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{str(name)[:200]!r}: cannot be opened: {reason}") from None
    for each in inside:
        check_ends(each)
    return path


def check_ends(path: Path) -> None:
    """Raises InputError for a pipe or a device, whose reader may wait without end."""
    try:
        mode = path.stat().st_mode
    except (OSError, RuntimeError):  # a link that leads nowhere, or in a circle
        return
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise InputError(f"{path}: a pipe or a device, which is not read as part of a folder; put a file there")


def check_links(folder: Path) -> None:
    """Raises ModelError for a link that leads out of a folder, by its name, and InputError for pipes and devices."""
    root = named_path(folder).resolve()
    cache = next((parent for parent in root.parents if parent.name.startswith(("models--", "datasets--"))), None)
    allowed = [root] if cache is None else [root, cache / "blobs"]
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            check_ends(path)
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise ModelError(f"{path}: a link that leads nowhere ({first_line(error)})") from None
        if not any(target.is_relative_to(place) for place in allowed):
            raise ModelError(
                f"{path}: a link out of the folder, to {target}, which is not followed; put the file itself there"
            )


def check_config(folder: Path, shapes: Sequence[tuple[int, ...]]) -> None:
    """Check the folder's `config.json` before transformers sees it.

    Args:
        shapes: shapes of all tensors of the weights files.

    Raises:
        ValueError: it is no JSON object, counts more layers, experts or labels than the tensors can serve, or names
            code to be fetched.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")
    longest = max((side for shape in shapes for side in shape), default=0)
    most = max(FEW, len(shapes), longest)
    for key, value in entries(config):
        if key in KERNELS and isinstance(value, str) and "/" in value:
            raise ValueError(f"{key} {value!r} names code to be fetched and run, which tersor does not")
        if COUNTED.search(key) and isinstance(value, int) and value > most:
            sizes = f"{len(shapes):,} tensors of at most {longest:,} rows or columns"
            raise ValueError(f"{key} is {value:,}, and the weights are {sizes}")


def entries(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All keys with their values, however deep; items of a list have the key of the list."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from entries(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from entries(value, key)
    else:
        yield key, config


def shapes_of(files: Sequence[Path]) -> list[tuple[int, ...]]:
    """The shapes of all tensors of weights files. Raises ModelError or ArtifactError for a damaged one."""
    found: list[tuple[int, ...]] = []
    for path in files:
        if path.name == CODED:
            found += [tuple(entry.shape) for entry in Container(path).header.tensors]
            continue
        if is_pickle(path):
            found += [tuple(tensor.shape) for tensor in read_weights(path).values()]
            continue
        with opened(path) as file:
            found += [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return found


def room_for(shapes: Sequence[tuple[int, ...]]) -> int:
    """The most weights that a model filled from such tensors may have: those that are missing are new, or tied."""
    return 4 * sum(math.prod(shape) for shape in shapes) + SPARE


@contextmanager
def at_most(num_weights: int, what: str) -> Iterator[None]:
    """Inside, a model is built on the meta device: raises ValueError as soon as it has more weights."""
    found = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal found
        if parameter is not None and parameter.is_meta:
            found += parameter.numel()
            if found > num_weights:
                raise ValueError(f"config.json describes more than {num_weights:,} weights, more than {what}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
