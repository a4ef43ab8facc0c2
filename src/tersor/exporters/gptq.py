"""GPTQ's checkpoint layout (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), version 1, as transformers, vLLM
and GPTQModel read it.

    qweight   [in * bits / 32, out] int32: the codes of an output column, one stream of bits downwards
    qzeros    [groups, out * bits / 32] int32: the zero points, less one
    scales    [groups, out] fp16
    g_idx     [in] int32: the group of each input

The client takes bits and group size from the config, so one format must serve all packed layers, and a kind of layer
is packed in every block or in none.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import FormatError
from tersor.exporters.contract import Checkpoint, Misfit, PackedSite, misfit_of
from tersor.exporters.folder import kept_linears, open_folder, packed_tensors, write_folder
from tersor.exporters.integers import check_one_format, nearby_int4, only_format, row_words, symmetric_grid
from tersor.formats.packing import pack

BITS = (8, 4, 3, 2)
HOLDS = (
    "symmetric int2, int3, int4 and int8, per row or in groups that divide the columns, in plain linear layers of the "
    "repeated blocks, where both sides are multiples of 32"
)
IN_BLOCK = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True)
class GptqExport:
    """A Hugging Face folder with `quant_method: gptq`."""

    name = "gptq"
    suffix = ""
    readers = "transformers, vLLM, GPTQModel"
    holds = HOLDS
    extra = None
    packages = ("optimum", "gptqmodel")

    def why_not(self, packed: PackedSite) -> Misfit | None:
        rows, columns = packed.site.shape
        in_block = IN_BLOCK.match(packed.module) is not None
        place = packed.is_linear and in_block and rows % 32 == 0 and columns % 32 == 0
        fits = symmetric_grid(packed, BITS) is not None
        return misfit_of(packed, HOLDS, place=place, fits=fits, instead=nearby_int4(packed))

    def check(self, checkpoint: Checkpoint) -> None:
        check_one_format(self.name, checkpoint)
        packed = {IN_BLOCK.sub("", site.module): site.module for site in checkpoint.quantized}
        for path in kept_linears(checkpoint):
            if IN_BLOCK.match(path) and (twin := packed.get(IN_BLOCK.sub("", path))):
                raise FormatError(
                    f"gptq packs a kind of layer in every block or in none; {path} is kept and {twin} is packed; "
                    f"compress again with one rule for '*.{IN_BLOCK.sub('', path)}'"
                )

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        group = only_format(checkpoint)
        config = {
            "quant_method": self.name,
            "bits": group.bits,
            "group_size": group.group_size or -1,
            "sym": True,
            "desc_act": False,
            "format": "gptq",
            "checkpoint_format": "gptq",
            "modules_in_block_to_quantize": [sorted({IN_BLOCK.sub("", p.module) for p in checkpoint.quantized})],
        }
        tensors = packed_tensors(checkpoint, module_tensors)
        notes = write_folder(checkpoint, output, to=self.name, tensors=tensors, quantization_config=config)
        (output / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return notes

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        return open_folder(checkpoint, output, torch.float16)


def module_tensors(packed: PackedSite) -> dict[str, Tensor]:
    """The tensors of the GPTQ layer that replaces the weight, by name in the module."""
    grid = packed.encoded.integers
    assert grid is not None
    zeros = torch.full(grid.scale.t().shape, 2 ** (grid.bits - 1) - 1, dtype=torch.uint8)
    num_columns = grid.shape[1]
    return {
        "qweight": row_words(grid).t().contiguous(),
        "qzeros": pack(zeros, grid.bits).view(torch.int32),
        "scales": grid.scale.t().contiguous(),
        "g_idx": (torch.arange(num_columns) // (grid.group_size or num_columns)).int(),
    }
