"""The tensors of a model's weights file: their names, and the size of the file.

A packed weight `layer.weight` is stored as its parts `layer.weight.codes`, `layer.weight.scale`, ...; everything else
under the names the model gives it. Tied tensors are stored once, under the first name.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from tersor.nn.packed import InputQuantizer, PackedConv, PackedLinear, PackedWeight, Stored, packed_weight
from tersor.nn.recurrent import PackedRecurrent
from tersor.nn.sites import Site, find_sites

CODED = "model.tersor"


def packed_sites(model: nn.Module) -> list[tuple[Site, PackedWeight, InputQuantizer | None]]:
    """The sites whose weight is packed, with what quantizes their input."""
    found = []
    for site in find_sites(model):
        module = model.get_submodule(site.owners[0].module)
        packed = packed_weight(module, site.owners[0].parameter)
        if packed is not None:
            found.append((site, packed, quantizer_of(module, site.owners[0].parameter)))
    return found


def quantizer_of(module: nn.Module, parameter: str) -> InputQuantizer | None:
    """The input quantizer of one of a module's weights; None if its inputs stay float."""
    if isinstance(module, PackedRecurrent):
        return module.quantizer(parameter)
    return module.input_quantizer if isinstance(module, PackedLinear | PackedConv) else None


def stored_parts(model: nn.Module) -> list[tuple[str, Stored]]:
    """All packed weights and input quantizers of a model, each with the prefix of its tensors' names."""
    parts: list[tuple[str, Stored]] = []
    for site, packed, quantizer in packed_sites(model):
        parts.append((site.parameter, packed))
        if quantizer is not None:
            parts.append((f"{site.parameter}.input", quantizer))
    return parts


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the weights file, by name."""
    parts = stored_parts(model)
    tensors = {f"{prefix}.{name}": tensor for prefix, stored in parts for name, tensor in stored.tensors.items()}
    return tensors | unpacked_tensors(model)


def unpacked_tensors(model: nn.Module, detach: bool = True) -> dict[str, Tensor]:
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
    """The tensors of a model that are none of these sites' weights, under whatever name."""
    weights = {id(tensor) for site in sites for tensor in (site.weight(model), *site.originals(model))}
    return {name: tensor for name, tensor in unpacked_tensors(model, detach=False).items() if id(tensor) not in weights}
