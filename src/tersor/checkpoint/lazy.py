"""Packed weights left in their file: `model.tersor` is decoded one site at a time, whenever the site runs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.checkpoint.container import DTYPES, Container
from tersor.nn.packed import packed_weight
from tersor.nn.sites import Site


class LazyContainer:
    """An open container that keeps the parts of one site in memory, those asked for last."""

    def __init__(self, path: Path):
        self.container = Container(path)
        self.latest: tuple[str, dict[str, Tensor]] = ("", {})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their types and shapes alone, on the meta device."""
        entries = self.container.entries
        return {n: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for n, e in entries.items()}

    def serve(self, model: nn.Module, site: Site) -> None:
        """Have a site that was restored from `tensors` ask for its parts whenever it runs."""
        module = model.get_submodule(site.owners[0].module)
        packed = packed_weight(module, site.owners[0].parameter)
        assert packed is not None
        packed.leave(partial(self.parts, site.parameter, tuple(packed.tensors)))
        quantizer = getattr(module, "input_quantizer", None)
        if quantizer is not None:
            for name in quantizer.tensors:
                quantizer._buffers[name] = self.container.tensor(f"{site.parameter}.input.{name}")

    def parts(self, prefix: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The decoded parts of one site."""
        if self.latest[0] != prefix:
            self.latest = ("", {})  # the old ones go before the new ones come
            found = self.container.tensors([f"{prefix}.{name}" for name in names], num_threads=1)
            self.latest = (prefix, {name: found[f"{prefix}.{name}"] for name in names})
        return self.latest[1]

    def decoded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the file that belong to no compressed layer, read into memory."""
        return self.container.tensors(list(tensors))
