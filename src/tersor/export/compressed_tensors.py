"""compressed-tensors (https://github.com/vllm-project/compressed-tensors): read by transformers and vLLM.

    pack-quantized   integers of 2 to 8 bits as a stream of 32-bit words per row
    int-quantized    int8 weights with int8 inputs (W8A8)
    float-quantized  8-bit floats, with float or 8-bit float inputs (FP8)

Every linear layer has its own entry in one of the `config_groups`, so formats may be mixed freely.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.encoded import Encoded
from tersor.export.contract import Checkpoint, Misfit, PackedSite
from tersor.export.folder import kept_linears, write_folder
from tersor.export.integers import int_group, row_words, whole_groups
from tersor.formats.fp8 import Fp8

HOLDS = (
    "in plain linear layers symmetric int2 to int8, per row or in groups that divide the columns, int8 with"
    " int8-dynamic or int8-static inputs, and fp8-e4m3 with float, fp8-e4m3-dynamic or fp8-e4m3-static inputs"
)
INPUTS: dict[str, dict[str, Any]] = {
    "int8-dynamic": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    "int8-static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "fp8-e4m3-dynamic": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    "fp8-e4m3-static": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
}


@dataclass(frozen=True)
class CompressedTensors:
    """A Hugging Face folder with `quant_method: compressed-tensors`."""

    name = "compressed-tensors"
    suffix = ""

    def misfit(self, packed: PackedSite) -> Misfit | None:
        if packed.is_plain:
            return None
        if not packed.is_linear:
            return Misfit(HOLDS, "bf16")
        group, float8 = int_group(packed.encoded), fp8(packed.encoded)
        if packed.activation is not None:
            kind = "int" if group and group.plain_int8 else "float" if float8 else None
            fits = kind is not None and INPUTS.get(packed.activation.format, {}).get("type") == kind
            return None if fits else Misfit(HOLDS, "int8/int8-dynamic")
        fits = float8 is not None or (group is not None and group.symmetric and whole_groups(packed.encoded))
        return None if fits else Misfit(HOLDS, "int4-g64" if packed.site.shape[1] % 64 == 0 else "int4")

    def check(self, checkpoint: Checkpoint) -> None:
        return None

    def write(self, checkpoint: Checkpoint, output: Path) -> Iterable[str]:
        tensors: dict[str, Tensor] = {}
        groups: dict[str, dict[str, Any]] = {}
        for packed in checkpoint.quantized:
            prefix = f"{packed.module}."
            tensors |= {prefix + name: tensor for name, tensor in module_tensors(packed).items()}
            scheme = groups.setdefault(packed.scheme, {**scheme_of(packed), "targets": []})
            scheme["targets"] += [place.module for place in packed.site.places]
        formats = {scheme["format"] for scheme in groups.values()}
        config = {
            "quant_method": self.name,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(groups.values())},
            "ignore": kept_linears(checkpoint),
            "kv_cache_scheme": None,
        }
        scales = [packed.encoded.parts["scale"] for packed in checkpoint.quantized]
        notes = write_folder(
            checkpoint, output, to=self.name, tensors=tensors, quantization_config=config, scales=scales
        )
        return [*notes, *notes_on(checkpoint)]


def module_tensors(packed: PackedSite) -> dict[str, Tensor]:
    """What stands in the place of the weight, by its name in the module."""
    parts, inputs = packed.encoded.parts, packed.activation.params if packed.activation else {}
    static = {f"input_{name}": tensor for name, tensor in inputs.items()}
    if (float8 := fp8(packed.encoded)) is not None:
        scale = parts["scale"].view(-1 if float8.per_tensor else (-1, 1))
        return {"weight": parts["values"], "weight_scale": scale, **static}
    if packed.activation is not None:
        return {"weight": parts["codes"], "weight_scale": parts["scale"], **static}
    return {
        "weight_packed": row_words(packed.encoded),
        "weight_scale": parts["scale"],
        "weight_shape": torch.tensor(packed.encoded.shape),
    }


def scheme_of(packed: PackedSite) -> dict[str, Any]:
    """The entry of `config_groups` that says how to decode a site."""
    inputs = INPUTS[packed.activation.format] if packed.activation else None
    format = "float-quantized" if fp8(packed.encoded) else "int-quantized" if inputs else "pack-quantized"
    return {
        "weights": weights_of(packed.encoded),
        "input_activations": inputs,
        "output_activations": None,
        "format": format,
    }


def weights_of(encoded: Encoded) -> Mapping[str, Any]:
    """`QuantizationArgs` of a weight."""
    grid = {"symmetric": True, "dynamic": False, "group_size": None}
    if (float8 := fp8(encoded)) is not None:
        return {**grid, "num_bits": 8, "type": "float", "strategy": "tensor" if float8.per_tensor else "channel"}
    group = int_group(encoded)
    assert group is not None
    strategy = "group" if group.group_size else "channel"
    return {**grid, "num_bits": group.bits, "type": "int", "strategy": strategy, "group_size": group.group_size}


def fp8(encoded: Encoded) -> Fp8 | None:
    """The format, if it is the one kind of 8-bit float that the client knows."""
    return encoded.format if isinstance(encoded.format, Fp8) and encoded.format.kind == "e4m3" else None


FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def notes_on(checkpoint: Checkpoint) -> list[str]:
    """What transformers takes and vLLM does not: other bits than 4 and 8, and mixed formats where it fuses layers."""
    notes = []
    groups = {packed.scheme: int_group(packed.encoded) for packed in checkpoint.quantized}
    odd = sorted(scheme for scheme, group in groups.items() if group and group.bits not in (4, 8))
    if odd:
        notes.append(
            f"vLLM runs 4 and 8 bits only; {', '.join(odd)} loads in transformers with compressed-tensors 0.20"
        )
    schemes = {packed.module: packed.scheme for packed in checkpoint.quantized}
    for path, module in checkpoint.model.named_modules():
        children = dict(module.named_children())
        for fused in FUSED:
            found = {schemes.get(f"{path}.{name}") for name in fused & children.keys()}
            if len(found) > 1:
                listed = ", ".join(sorted(fused))
                return [*notes, f"vLLM fuses {listed}, which differ in {path}: it needs one format for them"]
    return notes
