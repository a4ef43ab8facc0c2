"""Which tensors a model's weights file holds, under which names, and how large the file is.

A packed weight `layer.weight` is stored as its parts `layer.weight.codes`, `layer.weight.scale`, ...; everything else
under the names the model gives it. Tied tensors are stored once, under the first name.
"""

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tersor.modules import InputQuantizer, PackedConv, PackedLinear, PackedWeight, Stored
from tersor.recurrent import PackedRecurrent
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
Described = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor by its name, type and shape
CODED = "model.tersor"
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


def packed_sites(model: nn.Module) -> list[tuple[Site, PackedWeight, InputQuantizer | None]]:
    """The sites whose weight is packed, with what quantizes their input."""
    found = []
    for site in find_sites(model):
        module = model.get_submodule(site.places[0].module)
        packed = packed_weight(module, site.places[0].parameter)
        if packed is not None:
            found.append((site, packed, quantizer_of(module, site.places[0].parameter)))
    return found


def quantizer_of(module: nn.Module, parameter: str) -> InputQuantizer | None:
    """What quantizes the input of one of a module's weights."""
    if isinstance(module, PackedRecurrent):
        return module.quantizer(parameter)
    return module.input_quantizer if isinstance(module, PackedLinear | PackedConv) else None


def stored_parts(model: nn.Module) -> list[tuple[str, Stored]]:
    """What stands in the place of packed weights and before them, each with the prefix of its tensors' names."""
    parts: list[tuple[str, Stored]] = []
    for site, packed, quantizer in packed_sites(model):
        parts.append((site.parameter, packed))
        if quantizer is not None:
            parts.append((f"{site.parameter}.input", quantizer))
    return parts


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything the weights file holds, by name."""
    parts = stored_parts(model)
    tensors = {f"{prefix}.{name}": tensor for prefix, stored in parts for name, tensor in stored.tensors.items()}
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


def in_file_order(tensors: Iterable[Described]) -> list[Described]:
    """The order in which safetensors writes tensors: the widest types first, then by name."""
    return sorted(tensors, key=lambda tensor: (RANKS[tensor[1]], tensor[0]))


def header(tensors: Iterable[Described], metadata: Mapping[str, str]) -> bytes:
    """What comes before the data in a safetensors file: 8 bytes of length, and the JSON header padded to 8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in in_file_order(tensors):
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = encoded.ljust(-(-len(encoded) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded


def file_size(tensors: Iterable[Described], metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file with these tensors.

    >>> file_size([("a", torch.float16, (2, 3))], {}) - 8 - 64
    12
    """
    tensors = list(tensors)
    num_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in tensors)
    return len(header(tensors, metadata)) + num_bytes
