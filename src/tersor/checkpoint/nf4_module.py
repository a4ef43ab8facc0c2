"""bitsandbytes' 4-bit tensors of a layer (https://github.com/bitsandbytes-foundation/bitsandbytes), from nf4 codes."""

import json

import torch
from torch import Tensor

from tersor.formats.contract import Encoded
from tersor.formats.nf4 import BLOCK, NORMAL_FLOAT, Nf4, dynamic_levels


def is_nf4(encoded: Encoded) -> bool:
    """True if the weight is made of 4-bit NormalFloats, in blocks as bitsandbytes has them where they are full."""
    floats = encoded.floats
    return floats is not None and floats.element == "nf4" and floats.group_size == Nf4.group_size


def module_tensors(encoded: Encoded, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that bitsandbytes keeps for a weight of this dtype, by name in the module."""
    floats = encoded.floats
    assert floats is not None
    assert floats.scale is not None
    state = {
        "quant_type": "nf4",
        "blocksize": Nf4.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(encoded.shape),
    }
    nested: dict[str, Tensor] = {}
    if floats.nested:
        nested = {"nested_absmax": floats.nested["nested_absmax"], "nested_quant_map": dynamic_levels()}
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = floats.nested["offset"].item()
    tensors = {
        "absmax": floats.scale.flatten(),
        "quant_map": NORMAL_FLOAT.of_code,
        "quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        **nested,
    }
    return {"weight": floats.values.view(-1, 1), **{f"weight.{name}": tensor for name, tensor in tensors.items()}}
