"""Which tensors a model's weights file holds, under which names, and how large the file is.

A packed weight `layer.weight` is stored as its parts `layer.weight.codes`, `layer.weight.scale`, ...; everything else
under the names the model gives it. Tied tensors are stored once, under the first name.
"""

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tersor.checkpoint.weights import METADATA
from tersor.modules import InputQuantizer, PackedLinear, PackedWeight, Stored
from tersor.sites import Site, find_sites, packed_weight

DTYPE_NAMES = {  # in the order in which safetensors writes them
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


def packed_sites(model: nn.Module) -> list[tuple[Site, PackedWeight, InputQuantizer | None]]:
    """The sites whose weight is packed, with what quantizes their input."""
    found = []
    for site in find_sites(model):
        module = model.get_submodule(site.places[0].module)
        packed = packed_weight(module, site.places[0].parameter)
        if packed is not None:
            quantizer = module.input_quantizer if isinstance(module, PackedLinear) else None
            found.append((site, packed, quantizer))
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything the weights file holds, by name."""
    tensors: dict[str, Tensor] = {}
    for site, packed, quantizer in packed_sites(model):
        tensors |= {f"{site.parameter}.{part}": tensor for part, tensor in packed.tensors.items()}
        if quantizer is not None:
            tensors |= {f"{site.parameter}.input.{part}": tensor for part, tensor in quantizer.tensors.items()}
    return tensors | kept_tensors(model)


def kept_tensors(model: nn.Module, detach: bool = True) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are not packed, tied ones once."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Stored):
            continue
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | buffers).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                kept[f"{path}.{name}" if path else name] = tensor.detach() if detach else tensor
    return kept


def other_tensors(model: nn.Module, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Of the kept tensors, those that are none of these sites' weights, under whatever name."""
    weights = {id(site.weight(model)) for site in sites}
    return {name: tensor for name, tensor in kept_tensors(model, detach=False).items() if id(tensor) not in weights}


def file_size(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file with these tensors: 8, the JSON header padded to 8, and the data.

    >>> file_size([("a", torch.float16, (2, 3))], {}) - 8 - 64
    12
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (RANKS[t[1]], t[0])):
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(encoded) // 8) * 8 + offset


def size_of(model: nn.Module) -> int:
    """Bytes of the model's weights file, computed without writing it."""
    return file_size(((n, t.dtype, tuple(t.shape)) for n, t in tensors_of(model).items()), METADATA)
