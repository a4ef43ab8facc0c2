"""bitsandbytes' 4-bit tensors of a layer (https://github.com/bitsandbytes-foundation/bitsandbytes), from nf4 codes."""

import json

import torch
from torch import Tensor

from tersor.formats.contract import Encoded
from tersor.formats.nf4 import BLOCK, NORMAL_FLOAT, Nf4, Nf4Double, dynamic_levels


def module_tensors(encoded: Encoded, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that bitsandbytes keeps for a weight of this dtype, by name in the module."""
    parts = encoded.parts
    state = {
        "quant_type": "nf4",
        "blocksize": Nf4.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(encoded.shape),
    }
    nested: dict[str, Tensor] = {}
    if isinstance(encoded.format, Nf4Double):
        nested = {"nested_absmax": parts["nested_absmax"], "nested_quant_map": dynamic_levels()}
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": parts["offset"].item()}
    tensors = {
        "absmax": parts["absmax"].flatten(),
        "quant_map": NORMAL_FLOAT.of_code,
        "quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        **nested,
    }
    return {"weight": parts["codes"].view(-1, 1), **{f"weight.{name}": tensor for name, tensor in tensors.items()}}
