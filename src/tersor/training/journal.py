"""The checkpoint of a training run: one safetensors file, written whole or not at all.

A run that was killed goes on from its last checkpoint and ends in the very weights of one that was not: the file holds
the trained tensors, buffers, the optimizer's state, the random numbers' state and the step; the order of the data
depends on nothing but the seed and the step.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.checkpoint.output import LOCK, busy, journal_of
from tersor.core.errors import ArtifactError, InputError
from tersor.core.lock import held
from tersor.core.messages import first_line

Tensors = dict[str, Tensor]
SECONDS = 60.0  # between checkpoints


@dataclass
class Journal:
    """Checkpoints of one run.

    Attributes:
        path: the file.
        key: what the run depends on; a file with another key is not taken up.
        seconds: time between checkpoints.
    """

    path: Path
    key: str = ""
    seconds: float = SECONDS
    latest: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.latest >= self.seconds

    def write(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Replace the file: written beside it, flushed to disk, renamed. Raises ArtifactError when the disk refuses."""
        separate = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        write_whole(separate, self.path, {"key": self.key, "facts": json.dumps(facts)})
        self.latest = time.monotonic()

    def read(self) -> tuple[Tensors, dict[str, Any]] | None:
        """The content of the file; None if there is none, or it is of another run."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about["facts"])  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError):
            return None  # a damaged file is no checkpoint


def write_whole(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    """Write a file of a journal, in the place of an earlier one. Raises ArtifactError, and leaves that as it was, when
    the disk refuses."""
    beside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink()
        raise ArtifactError(f"{path}: the training's checkpoint cannot be written: {first_line(error)}") from None


@contextmanager
def journal_for(output: Path, wanted: bool = True) -> Iterator[Path | None]:
    """The folder for the checkpoints of the run that makes `output`, which no other run may use meanwhile: removed when
    the block ends well, and else kept, if there is a checkpoint in it, which the error then says.

    Raises InputError when another run has it.
    """
    if not wanted:
        yield None
        return
    folder = journal_of(output.absolute())
    with ExitStack() as stack:
        try:
            folder.mkdir(exist_ok=True)
            stack.enter_context(held(folder / LOCK, output=output.name))
        except BlockingIOError:
            raise InputError(busy(output, folder / LOCK)) from None
        except OSError as error:
            raise ArtifactError(f"{output}: cannot be written: {first_line(error)}") from None
        try:
            yield folder
        except BaseException as error:
            tell(error, folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def tell(error: BaseException, folder: Path) -> None:
    """Have an error say what of the training is kept; where nothing is, remove the folder."""
    if not any(folder.rglob("*.safetensors")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    error.add_note(
        f"what was trained until the last checkpoint is kept in {folder}: the same command goes on from there"
    )


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's state as tensors `optimizer.<parameter>.<name>` and plain numbers."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    plain: dict[str, Any] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            place = tensors if isinstance(value, Tensor) else plain
            place[f"optimizer.{number}.{name}"] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, facts: dict[str, Any]) -> None:
    """Load the optimizer's state from what `pack_optimizer` gave."""
    state: dict[int, dict[str, Any]] = {}
    both = [*facts["state"].items(), *((n, t) for n, t in tensors.items() if n.startswith("optimizer."))]
    for place, value in both:
        _, number, name = place.split(".", 2)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})
