"""A Hugging Face folder with every weight decoded to 16 bits, for programs that read no packed ones."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.notice import without
from tersor.core.weights_file import write_weights
from tersor.exporters.contract import Checkpoint, Misfit, PackedSite
from tersor.exporters.folder import open_folder


@dataclass(frozen=True)
class Halves:
    """A folder that transformers opens as any other."""

    name = "halves"
    suffix = ""
    readers = "transformers"
    holds = "every format, decoded to fp16"
    extra = None
    packages = ("transformers",)

    def why_not(self, packed: PackedSite) -> Misfit | None:
        return None

    def check(self, checkpoint: Checkpoint) -> None:
        return None

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        weights = {p.site.parameter: p.site.fold.unfold(p.encoded.decode(torch.float16)) for p in checkpoint.sites}
        write_weights({**checkpoint.kept, **weights}, output / "model.safetensors")
        config = without(json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8")))
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return ["every weight is decoded: the folder is as large as the original's in fp16"]

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        return open_folder(checkpoint, output, torch.float32)
