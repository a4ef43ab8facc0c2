"""AWQ's checkpoint layout (Lin et al. 2023, https://arxiv.org/abs/2306.00978), version `gemm`, as transformers and
vLLM read it.

    qweight   [in, out / 8] int32: eight output columns in a word, in the order 0 2 4 6 1 3 5 7
    qzeros    [groups, out / 8] int32: the zero points, in the same order
    scales    [groups, out] fp16

The client takes the group size from the config, so one format must serve all packed layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from tersor.exporters.contract import Checkpoint, Misfit, PackedSite, misfit_of
from tersor.exporters.folder import kept_linears, open_folder, packed_tensors, write_folder
from tersor.exporters.integers import check_one_format, nearby_int4, only_format, symmetric_grid
from tersor.formats.packing import pack

HOLDS = (
    "symmetric int4 in groups that divide the columns, in plain linear layers other than lm_head whose rows are a "
    "multiple of 8"
)
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


@dataclass(frozen=True)
class AwqExport:
    """A Hugging Face folder with `quant_method: awq`."""

    name = "awq"
    suffix = ""
    readers = "transformers, vLLM"
    holds = HOLDS
    extra = None
    packages = ("gptqmodel", "accelerate")

    def why_not(self, packed: PackedSite) -> Misfit | None:
        rows, columns = packed.site.shape
        place = packed.is_linear and packed.module != "lm_head" and rows % 8 == 0 and columns % 32 == 0
        grid = symmetric_grid(packed, bits=[4])
        fits = grid is not None and grid.group_size is not None
        return misfit_of(packed, HOLDS, place=place, fits=fits, instead=nearby_int4(packed))

    def check(self, checkpoint: Checkpoint) -> None:
        check_one_format(self.name, checkpoint)

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        config = {
            "quant_method": self.name,
            "bits": 4,
            "group_size": only_format(checkpoint).group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": kept_linears(checkpoint),
        }
        tensors = packed_tensors(checkpoint, module_tensors)
        return write_folder(checkpoint, output, to=self.name, tensors=tensors, quantization_config=config)

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        return open_folder(checkpoint, output, torch.float16)


def module_tensors(packed: PackedSite) -> dict[str, Tensor]:
    """The tensors of the AWQ layer that replaces the weight, by name in the module."""
    grid = packed.encoded.integers
    assert grid is not None
    scales = grid.scale.t().contiguous()
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    return {"qweight": words(grid.codes.t()), "qzeros": words(zeros), "scales": scales}


def words(codes: UInt8[Tensor, "n out"]) -> Int32[Tensor, "n words"]:
    """Codes packed into int32 words: eight 4-bit codes of a row in each, in AWQ's order."""
    return pack(codes.unflatten(1, (-1, 8))[..., ORDER].flatten(1), bits=4).view(torch.int32)
