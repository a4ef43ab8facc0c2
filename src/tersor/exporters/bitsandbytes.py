"""4-bit checkpoints of bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes), read by transformers.

weight                                   [out * in / 2, 1] uint8: two codes a byte, the first in the high half
weight.absmax                            a scale per 64 weights: float32, or uint8 when quantized themselves
weight.quant_map                         [16] float32: the levels
weight.nested_absmax, .nested_quant_map  scales and levels of the scales
weight.quant_state.bitsandbytes__nf4     JSON as bytes: sizes, dtype and offset
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.nf4_module import is_nf4, module_tensors
from tersor.exporters.contract import Checkpoint, Misfit, PackedSite, misfit_of
from tersor.exporters.folder import kept_linears, open_folder, packed_tensors, write_folder
from tersor.formats.nf4 import Nf4

HOLDS = "nf4 and nf4-dq in plain linear layers whose columns are a multiple of 64"


def is_nested(packed: PackedSite) -> bool:
    """True if the scales of a weight are quantized themselves."""
    floats = packed.encoded.floats
    return floats is not None and bool(floats.nested)


@dataclass(frozen=True)
class BitsAndBytes:
    """A Hugging Face folder with `quant_method: bitsandbytes`."""

    name = "bitsandbytes"
    suffix = ""
    readers = "transformers"
    holds = HOLDS
    extra = None
    packages = ("bitsandbytes", "accelerate")

    def why_not(self, packed: PackedSite) -> Misfit | None:
        place = packed.is_linear and packed.site.shape[1] % Nf4.group_size == 0
        fits = is_nf4(packed.encoded) and packed.activation is None
        return misfit_of(packed, HOLDS, place=place, fits=fits, instead="nf4")

    def check(self, checkpoint: Checkpoint) -> None:
        return None

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        dtype = str(checkpoint.quantized[0].site.dtype).removeprefix("torch.")
        config = {
            "quant_method": self.name,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(map(is_nested, checkpoint.quantized)),
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept_linears(checkpoint),
        }
        tensors = packed_tensors(checkpoint, lambda packed: module_tensors(packed.encoded, packed.site.dtype))
        return write_folder(checkpoint, output, to=self.name, tensors=tensors, quantization_config=config)

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        return open_folder(checkpoint, output, torch.float32)
