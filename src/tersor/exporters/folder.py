"""Reading and writing of Hugging Face folders with a `quantization_config`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.manifest import MANIFEST, read_manifest, weights_path
from tersor.checkpoint.notice import without
from tersor.checkpoint.side_files import copy_side_files
from tersor.core.files import sha256
from tersor.core.weights_file import write_weights
from tersor.exporters.contract import Checkpoint, PackedSite
from tersor.formats.contract import Encoded
from tersor.nn.sites import is_linear

WEIGHTS = "model.safetensors"
PROVENANCE = "tersor-export.json"


def packed_tensors(
    checkpoint: Checkpoint, module_tensors: Callable[[PackedSite], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of all quantized sites by their full names; `module_tensors` gives those of one by their own."""
    return {
        f"{packed.module}.{name}": tensor
        for packed in checkpoint.quantized
        for name, tensor in module_tensors(packed).items()
    }


def cast_scale(encoded: Encoded) -> Tensor | None:
    """The scales that clients keep in the model's own type; None where they keep theirs as they are (NF4)."""
    if (grid := encoded.integers) is not None:
        return grid.scale
    floats = encoded.floats
    return floats.scale if floats is not None and floats.element != "nf4" else None


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    to: str,
    tensors: Mapping[str, Tensor],
    quantization_config: Mapping[str, Any],
    dtype: str | None = None,
) -> list[str]:
    """Fill `folder`: the packed `tensors` and all others, the config with its `quantization_config`, the tokenizer.

    Clients cast the `scale` of a format to the model's dtype. The config names `dtype`, if the client knows no other,
    else one that holds all scales exactly; returns a note where that is not the one the model came in.
    """
    copy_side_files(checkpoint.folder, folder)
    config = without(json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8")))
    original = config.pop("torch_dtype", None) or config.get("dtype") or "float32"
    scales = [scale for packed in checkpoint.quantized if (scale := cast_scale(packed.encoded)) is not None]
    config["dtype"] = dtype or exact_dtype(original, scales, checkpoint.tensors)
    config["quantization_config"] = dict(quantization_config)
    write_weights({**tensors, **checkpoint.tensors}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    weights = weights_path(checkpoint.folder, read_manifest(checkpoint.folder))
    provenance = {
        "to": to,
        "artifact": {file.name: sha256(file) for file in (checkpoint.folder / MANIFEST, weights)},
        "sites": {packed.site.name: packed.scheme for packed in checkpoint.sites},
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    if config["dtype"] == original:
        return []
    why = f"decodes to {dtype} only" if dtype else f"would round the scales to {original}"
    return [f"config.json says dtype {config['dtype']}: the client {why}"]


def exact_dtype(original: str, scales: Sequence[Tensor], others: Mapping[str, Tensor]) -> str:
    """The first dtype that changes no scale and overflows nowhere: the model's own, float16, or float32."""
    floats = [tensor for tensor in others.values() if tensor.is_floating_point() and tensor.numel()]
    for name in (original, "float16"):
        dtype = getattr(torch, name)
        fits = all(tensor.abs().max() <= torch.finfo(dtype).max for tensor in floats)
        if fits and all(is_exact(scale, dtype) for scale in scales):
            return name
    return "float32"


def is_exact(scale: Tensor, dtype: torch.dtype) -> bool:
    """True if a cast to `dtype` leaves every value as it is."""
    return torch.equal(scale.to(dtype).double(), scale.double())


def kept_linears(checkpoint: Checkpoint) -> list[str]:
    """The linear layers that stay float, by module path: where a client must not look for packed weights."""
    packed = {place.module for packed in checkpoint.quantized for place in packed.site.owners}
    plain = {place.module for packed in checkpoint.sites if packed.is_plain for place in packed.site.owners}
    linears = [path for path, module in checkpoint.model.named_modules() if is_linear(module) or path in plain]
    return [path for path in linears if path not in packed and path != ""]


def open_folder(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Open a folder by `from_pretrained`: the model, and the information about loading it."""
    kind: Any = type(checkpoint.model)
    return kind.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
    )
