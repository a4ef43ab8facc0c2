"""Plain transformers opens artifacts: tersor as one of its quantizers.

An artifact's `config.json` names `tersor` as its `quant_method`. `from_pretrained` then builds the model without
weights and asks `TersorQuantizer`, which puts the artifact's into it, with the checks and the functions of
`tersor.load`. transformers itself is given a weights file without tensors, and sees of the model only what the
artifact does not hold, such as a new head, which it initializes and reports as ever.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.checkpoint.artifact import StoredTensors, fill, place_packed
from tersor.checkpoint.container import Container
from tersor.checkpoint.guards import check_links
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.manifest import MANIFEST, WEIGHTS, check_files, read_manifest, weights_path
from tersor.checkpoint.notice import KEY, METHOD, NO_WEIGHTS
from tersor.checkpoint.restore import read_tensors
from tersor.checkpoint.safetensors_header import read_spans
from tersor.core.errors import ArtifactError, InputError
from tersor.nn.packed import decode_weights
from tersor.nn.sites import find_sites


class TersorConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact. How each weight is stored stands in `tersor.json`.

    Attributes:
        dequantize: decode the weights into ordinary parameters, as `tersor.load(folder, packed=False)` does.
    """

    def __init__(self, dequantize: bool = False, **_: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.dequantize = dequantize

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@dataclass
class Filling:
    """The part of a transformers model that an artifact fills.

    Attributes:
        folder: the artifact.
        manifest: its `tersor.json`.
        prefix: what the artifact's names begin with, where it holds a model of another head; others are left out.
        inner: what the model's names have in the place of `prefix`.
        partly: the model is of another class: it may have weights that the artifact does not, and the other way round.
    """

    folder: Path
    manifest: dict[str, Any]
    prefix: str = ""
    inner: str = ""
    partly: bool = False

    @property
    def weights(self) -> Path:
        return weights_path(self.folder, self.manifest)

    def renamed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The artifact's tensors or sites by the names that the model has for them."""
        kept = {name: thing for name, thing in content.items() if name.startswith(self.prefix)}
        return {self.inner + name.removeprefix(self.prefix): thing for name, thing in kept.items()}

    def held(self, own: Collection[str]) -> set[str]:
        """Those of a model's parameters and buffers that the artifact holds, whole or in parts."""
        return {root for name in self.renamed(dict.fromkeys(stored_names(self.weights))) for root in roots(name)} & set(
            own
        )


class TersorQuantizer(HfQuantizer):
    """The quantizer that lets `from_pretrained` fill a model from an artifact."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **options: Any):
        super().__init__(quantization_config, **options)
        self.filling: Filling | None = None
        self.dtype: torch.dtype | None = None
        self.device = torch.device("cpu")

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """The one device that the model goes to. Raises InputError for a map that spreads it over several."""
        if isinstance(device_map, str):  # auto and its like
            device_map = {"": torch.accelerator.current_accelerator() or "cpu"}
        places = set((device_map or {}).values())
        if len(places) > 1 or "disk" in places:
            raise InputError(
                f"device_map={device_map}: the model of a tersor artifact goes to one device; give that, for example "
                f"device_map='cpu'"
            )
        for place in places:
            self.device = torch.device(place)
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that the model is to compute in, unchanged."""
        self.dtype = dtype
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Has transformers look for the file without weights; without a quantizer, it stops at what stands there."""
        setattr(config, KEY, NO_WEIGHTS)
        config.dtype = config.dtype or torch.float32
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        """Find out what the artifact holds, and show transformers nothing but the rest."""
        delattr(model.config, KEY)
        self.filling = filling = open_filling(Path(checkpoint_files[0]).parent, model)
        state = model.state_dict(keep_vars=True)
        held = filling.held(state)
        if not held:
            made, asked = filling.manifest["model"]["class"], type(model).__name__
            raise ArtifactError(f"{filling.folder}: holds a {made}, which has no weights of a {asked}")
        rest = {name: tensor for name, tensor in state.items() if name not in held}
        for name in held:
            state[name]._is_hf_initialized = True
        model.state_dict = lambda *args, **options: dict(rest)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Put the artifact's weights into the model, which has them on the meta device until now."""
        filling = self.filling
        assert filling is not None
        del model.state_dict
        packed = not getattr(self.quantization_config, "dequantize", False)
        check_files(filling.folder, filling.manifest)
        tensors, sites = filling.renamed(read_tensors(filling.weights)), filling.renamed(filling.manifest["sites"])
        if filling.partly:
            own, known = model.state_dict(), {site.name for site in find_sites(model)}
            tensors = {name: tensor for name, tensor in tensors.items() if own.keys() & set(roots(name))}
            sites = {name: entry for name, entry in sites.items() if name in known}
        stored = StoredTensors(filling.folder, tensors)
        place_packed(model, {"sites": sites}, stored, packed=packed)
        fill(model, stored, partly=filling.partly)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise ArtifactError(f"{filling.folder}: has no {name}, which a {type(model).__name__} needs")
        model.to(device=self.device, dtype=None if self.dtype == saved_dtype(filling.folder) else self.dtype).eval()
        self.filling = None

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        decode_weights(model)
        return model.to(dtype)

    def is_serializable(self) -> bool:
        """True: `save_pretrained` of a packed model writes an artifact (nn/pretrained.py)."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on packed weights can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def open_filling(folder: Path, model: Any) -> Filling:
    """The part of a transformers model that the artifact in `folder`, or in the hub's cache, fills.

    Raises ArtifactError where there is no artifact, ModelError for links that lead out of the folder.
    """
    import transformers

    complete(folder)
    check_links(folder)
    manifest = read_manifest(folder)
    made = manifest["model"]["class"]
    if type(model).__name__ == made:
        return Filling(folder, manifest)
    prefix = f"{model.base_model_prefix}."
    if getattr(getattr(transformers, made, None), "base_model_prefix", None) != model.base_model_prefix:
        raise ArtifactError(f"{folder}: holds a {made}, which cannot be opened as a {type(model).__name__}")
    has_head = any(name.startswith(prefix) for name in stored_names(weights_path(folder, manifest)))
    inner = "" if model.base_model is model else prefix
    return Filling(folder, manifest, prefix if has_head else "", inner, partly=True)


def complete(folder: Path) -> None:
    """Fetch the manifest and the weights of an artifact on the hub, where transformers has fetched its config alone."""
    revision = next((place for place in (folder, *folder.parents) if place.parent.name == "snapshots"), None)
    if (folder / MANIFEST).exists() or revision is None:
        return
    from huggingface_hub import snapshot_download

    cache, within = revision.parent.parent, folder.relative_to(revision)
    snapshot_download(
        cache.name.removeprefix("models--").replace("--", "/"),
        revision=revision.name,
        cache_dir=cache.parent,
        allow_patterns=[(within / name).as_posix() for name in (MANIFEST, WEIGHTS, CODED)],
    )


def saved_dtype(folder: Path) -> torch.dtype:
    """The type that a folder's configuration names, for which weights are left in the types they are stored in."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return getattr(torch, named, torch.float32)


def stored_names(weights: Path) -> list[str]:
    """The names of the tensors in an artifact's weights file. Raises ArtifactError, ModelError for a damaged one."""
    return list(Container(weights).entries if weights.name == CODED else read_spans(weights))


def roots(name: str) -> Iterator[str]:
    """
    >>> list(roots("layer.weight.codes"))
    ['layer', 'layer.weight', 'layer.weight.codes']
    """
    return accumulate(name.split("."), lambda root, part: f"{root}.{part}")


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(TersorConfig)
    register_quantizer(METHOD)(TersorQuantizer)
