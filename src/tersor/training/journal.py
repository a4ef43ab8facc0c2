"""Where a training run stands, on disk: one safetensors file, written whole or not at all.

A run that was killed goes on from its last checkpoint and ends in the very weights of one that was not: the file holds
the trained tensors, buffers, the optimizer's state, the random numbers' state and the step; the order of the data
depends on nothing but the seed and the step.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
        """Replace the file: written beside it, flushed to disk, renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        separate = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(separate, beside, {"key": self.key, "facts": json.dumps(facts)})
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self.latest = time.monotonic()

    def read(self) -> tuple[Tensors, dict[str, Any]] | None:
        """What the file holds; None where there is none, or one of another run."""
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
    """Put back what `pack_optimizer` took."""
    state: dict[int, dict[str, Any]] = {}
    both = [*facts["state"].items(), *((n, t) for n, t in tensors.items() if n.startswith("optimizer."))]
    for place, value in both:
        _, number, name = place.split(".", 2)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["param_groups"]})
