"""compressed-tensors (https://github.com/vllm-project/compressed-tensors): read by transformers and vLLM.

    pack-quantized        integers of 2 to 8 bits as a stream of 32-bit words per row
    int-quantized         int8 weights with int8 inputs (W8A8)
    float-quantized       8-bit floats, with float or 8-bit float inputs (FP8)
    nvfp4-pack-quantized  4-bit floats, an E4M3 scale per 16 columns and a divisor of the whole tensor
    mxfp4-pack-quantized  4-bit floats, a power of two (E8M0) per 32 columns

Every linear layer has its own entry in one of the `config_groups`, so formats may be mixed; but transformers decodes
4-bit floats to bfloat16, and then needs scales of that precision everywhere.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import FormatError, ModelError
from tersor.core.messages import first_line
from tersor.exporters.contract import Checkpoint, Misfit, PackedSite, misfit_of
from tersor.exporters.folder import is_exact, kept_linears, open_folder, packed_tensors, write_folder
from tersor.exporters.integers import row_words, symmetric_grid
from tersor.formats.contract import Encoded
from tersor.formats.views import FloatView

HOLDS = (
    "in plain linear layers symmetric int2 to int8, per row or in groups that divide the columns, int8 with"
    " int8-dynamic or int8-static inputs, fp8-e4m3 with float, fp8-e4m3-dynamic or fp8-e4m3-static inputs,"
    " and nvfp4 and mxfp4 whose blocks divide the columns"
)
INPUTS: dict[str, dict[str, Any]] = {
    "int8-dynamic": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "int8-static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "fp8-e4m3-dynamic": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8-e4m3-static": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that vLLM joins into one


@dataclass(frozen=True)
class CompressedTensors:
    """A Hugging Face folder with `quant_method: compressed-tensors`."""

    name = "compressed-tensors"
    suffix = ""
    readers = "transformers, vLLM"
    holds = HOLDS
    extra = None
    packages = ("compressed_tensors",)

    def why_not(self, packed: PackedSite) -> Misfit | None:
        grid, float8, float4 = packed.encoded.integers, fp8(packed.encoded), fp4(packed.encoded)
        instead = "int4-g64" if packed.site.shape[1] % 64 == 0 else "int4"
        if packed.activation is not None:
            kind = "int" if grid and grid.plain_int8 else "float" if float8 else None
            fits = kind is not None and INPUTS.get(packed.activation.format, {}).get("type") == kind
            instead = "int8/int8-dynamic"
        else:
            blocks = float4 is not None and float4.whole_groups
            fits = blocks or float8 is not None or symmetric_grid(packed, bits=range(2, 9)) is not None
        return misfit_of(packed, HOLDS, place=packed.is_linear, fits=fits, instead=instead)

    def check(self, checkpoint: Checkpoint) -> None:
        float4 = [packed for packed in checkpoint.quantized if fp4(packed.encoded)]
        for packed in checkpoint.quantized if float4 else []:
            view = packed.encoded.floats or packed.encoded.integers
            if view is None or view.scale is None or not is_exact(view.scale, torch.bfloat16):
                raise FormatError(
                    f"{self.name}: clients run {float4[0].scheme} in bfloat16, which would round the scales of "
                    f"{packed.site.name}, {packed.scheme}; compress again with "
                    f"--rule '{packed.site.name}={float4[0].scheme}' or 'fp8-e4m3'"
                )

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        groups: dict[str, dict[str, Any]] = {}
        for packed in checkpoint.quantized:
            scheme = groups.setdefault(packed.scheme, {**scheme_of(packed), "targets": []})
            scheme["targets"] += [place.module for place in packed.site.owners]
        formats = {scheme["format"] for scheme in groups.values()}
        config = {
            "quant_method": self.name,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(groups.values())},
            "ignore": kept_linears(checkpoint),
            "kv_cache_scheme": None,
        }
        tensors = packed_tensors(checkpoint, module_tensors)
        for modules in fused_layers(checkpoint):
            tensors |= shared_scales(tensors, modules)
        dtype = "bfloat16" if any(fp4(packed.encoded) for packed in checkpoint.quantized) else None
        notes = write_folder(checkpoint, output, to=self.name, tensors=tensors, quantization_config=config, dtype=dtype)
        return [*notes, *notes_on(checkpoint, tensors)]

    def open(self, checkpoint: Checkpoint, output: Path) -> tuple[nn.Module, dict[str, Any]]:
        dtype = torch.bfloat16 if any(fp4(packed.encoded) for packed in checkpoint.quantized) else torch.float32
        try:
            return open_folder(checkpoint, output, dtype)
        except AttributeError as error:  # packed integers have no `weight`, and some models fill theirs first
            raise ModelError(
                f"{self.name}: transformers cannot open packed weights in {type(checkpoint.model).__name__} "
                f"({first_line(error)}); nothing was kept. Compress again with fp8-e4m3, or export to onnx or openvino"
            ) from None


def module_tensors(packed: PackedSite) -> dict[str, Tensor]:
    """The tensors of the compressed-tensors layer that replaces the weight, by name in the module."""
    inputs = packed.activation.params if packed.activation else {}
    static = {f"input_{name}": tensor for name, tensor in inputs.items()}
    if (float8 := fp8(packed.encoded)) is not None and float8.scale is not None:
        scale = float8.scale if len(float8.scale) == float8.shape[0] else float8.scale.view(-1)
        return {"weight": float8.values, "weight_scale": scale, **static}
    if (float4 := fp4(packed.encoded)) is not None and float4.scale is not None:
        tensors = {"weight_packed": float4.values, "weight_scale": float4.scale}
        if (tensor_scale := float4.nested.get("tensor_scale")) is not None:
            tensors["weight_global_scale"] = 1 / tensor_scale  # exact, for it is a power of two
        return tensors
    grid = packed.encoded.integers
    assert grid is not None
    if packed.activation is not None:
        return {"weight": grid.stored, "weight_scale": grid.scale, **static}
    return {
        "weight_packed": row_words(grid),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(grid.shape),
    }


def scheme_of(packed: PackedSite) -> dict[str, Any]:
    """The entry of `config_groups` that says how to decode a site."""
    inputs = INPUTS[packed.activation.format] if packed.activation else None
    if fp4(packed.encoded):
        layout = f"{packed.encoded.format.name}-pack-quantized"
    else:
        layout = "float-quantized" if fp8(packed.encoded) else "int-quantized" if inputs else "pack-quantized"
    return {
        "weights": weights_of(packed.encoded),
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }


def weights_of(encoded: Encoded) -> Mapping[str, Any]:
    """The fields of `QuantizationArgs` that describe a weight."""
    grid = {"symmetric": True, "dynamic": False, "group_size": None}
    if (float8 := fp8(encoded)) is not None and float8.scale is not None:
        strategy = "channel" if len(float8.scale) == float8.shape[0] else "tensor"
        return {**grid, "num_bits": 8, "type": "float", "strategy": strategy}
    if (float4 := fp4(encoded)) is not None and float4.scale is not None:
        blocks = {"group_size": float4.group_size, "scale_dtype": str(float4.scale.dtype)}
        strategy = "tensor_group" if float4.nested else "group"
        return {**grid, "num_bits": 4, "type": "float", "strategy": strategy, **blocks}
    integers = encoded.integers
    assert integers is not None
    strategy = "group" if integers.group_size else "channel"
    return {**grid, "num_bits": integers.bits, "type": "int", "strategy": strategy, "group_size": integers.group_size}


def fp8(encoded: Encoded) -> FloatView | None:
    """The weight, if it is made of the one kind of 8-bit floats that the client knows."""
    floats = encoded.floats
    return floats if floats is not None and floats.element == "e4m3" else None


def fp4(encoded: Encoded) -> FloatView | None:
    """The weight if it is made of 4-bit floats, else None."""
    floats = encoded.floats
    return floats if floats is not None and floats.element == "e2m1" else None


def fused_layers(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """The paths of linear layers that vLLM joins into one."""
    for path, module in checkpoint.model.named_modules():
        children = dict(module.named_children())
        for names in FUSED:
            if found := [f"{path}.{name}" for name in names if name in children]:
                yield found


def shared_scales(tensors: Mapping[str, Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
    """NVFP4 scales of joined layers with one divisor, as vLLM needs them; empty where that would change a weight.

    Divisors are powers of two, so the block scales take up the difference exactly, unless one becomes too small for
    E4M3. The smallest divisor is the one under which none becomes too large.
    """
    divisors = [tensors.get(f"{module}.weight_global_scale") for module in modules]
    own = [divisor for divisor in divisors if divisor is not None]
    if len(own) < len(modules):
        return {}
    shared = torch.stack(own).amin(0)
    moved: dict[str, Tensor] = {}
    for module, divisor in zip(modules, own, strict=True):
        scale = tensors[f"{module}.weight_scale"].float()
        stored = (scale * (shared / divisor)).to(torch.float8_e4m3fn)
        if not torch.equal(stored.float() * (divisor / shared), scale):
            return {}
        moved |= {f"{module}.weight_scale": stored, f"{module}.weight_global_scale": shared}
    return moved


def notes_on(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> list[str]:
    """Notes on what transformers loads and vLLM does not: integers of other than 4 and 8 bits, and layers that vLLM
    fuses but that differ in format or in NVFP4's divisor."""
    notes = []
    grids = {packed.scheme: packed.encoded.integers for packed in checkpoint.quantized}
    odd = sorted(scheme for scheme, grid in grids.items() if grid and grid.bits not in (4, 8))
    if odd:
        notes.append(
            f"vLLM runs 4 and 8 bits only; {', '.join(odd)} loads in transformers with compressed-tensors 0.20"
        )
    schemes = {packed.module: packed.scheme for packed in checkpoint.quantized}
    for modules in fused_layers(checkpoint):
        listed = ", ".join(sorted(module.rpartition(".")[2] for module in modules))
        place = modules[0].rpartition(".")[0]
        if len({schemes.get(module) for module in modules}) > 1:
            return [*notes, f"vLLM fuses {listed}, which differ in {place}: it needs one format for them"]
        divisors = {tensors[name].item() for module in modules if (name := f"{module}.weight_global_scale") in tensors}
        if len(divisors) > 1:
            return [*notes, f"vLLM fuses {listed} under one scale, and in {place} no nvfp4 scale serves all; use mxfp4"]
    return notes
