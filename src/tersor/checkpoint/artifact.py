"""Artifacts: folders that hold a compressed model and everything needed to load, check and explain it.

    model.safetensors   packed weights (see layout.py and docs/formats.md), or
    model.tersor        the same tensors, entropy-coded (container.py)
    tersor.json         the manifest: recipe, sites and their formats, versions, hashes, scorecards, verdict
    config.json, tokenizer files   as they came
    README.md           the model card

A folder appears whole or not at all (output.py), and lists every file in it (seal.py).
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.container_write import holds_codes, write_coded
from tersor.checkpoint.guards import check_links
from tersor.checkpoint.layout import CODED, other_tensors, packed_sites, tensors_of
from tersor.checkpoint.lazy import LazyContainer
from tersor.checkpoint.manifest import (
    MANIFEST,
    VERSION,
    WEIGHTS,
    check_files,
    read_manifest,
    weights_path,
    write_manifest,
)
from tersor.checkpoint.notice import KEY, QUANTIZATION, post
from tersor.checkpoint.output import atomic_folder, check_output
from tersor.checkpoint.restore import read_decoded, read_tensors, restore_rest, restore_site
from tersor.checkpoint.seal import first_foreign, listing
from tersor.checkpoint.side_files import copy_side_files
from tersor.checkpoint.skeleton import skeleton
from tersor.checkpoint.source import open_transformers, read_state
from tersor.core.arguments import Rule, checked
from tersor.core.errors import ArtifactError, InputError
from tersor.core.weights_file import check_finite, write_weights
from tersor.nn.pretrained import guard
from tersor.nn.sites import Site, find_sites


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    source: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
    coded: bool | None = None,
) -> None:
    """Write `model`, packed weights and all, into `folder`, which appears whole or not at all. One that tersor wrote is
    replaced; one that holds anything else is left alone.

    Args:
        source: folder whose config and tokenizer files are copied as they are; without it, or where the model's sizes
            are no longer those of its config, a transformers model writes its config itself.
        manifest: more keys for `tersor.json`.
        coded: write the tensors entropy-coded, as `model.tersor`; by default, where a site's format is `coded`.

    Raises:
        InputError: the folder holds files that tersor did not write.
        ArtifactError: the disk or the place refuses.
    """
    folder = Path(folder)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be created: {error.strerror}") from None
    check_output(folder, overwrite=True)
    with atomic_folder(folder, overwrite=True) as working:
        write(model, working, source=source, manifest=manifest, coded=coded)


def save_into(model: nn.Module, folder: Path) -> None:
    """Write `model` as `save` does, into a folder that may hold other files, which stay: those of its tokenizer, say.

    Raises as `save`.
    """
    if not folder.exists() or first_foreign(folder) is None:
        save(model, folder)
        return
    with tempfile.TemporaryDirectory(prefix=".tersor-", dir=folder) as working:
        write(model, Path(working))
        for name in (WEIGHTS, CODED):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(Path(working).iterdir()):
            os.replace(path, folder / path.name)


def write(
    model: nn.Module,
    folder: Path,
    *,
    source: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
    coded: bool | None = None,
) -> None:
    """Write `model` into an empty folder, as `save` says."""
    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    if source is not None:
        copy_side_files(source, folder)
        if config is not None and differs(config, folder):
            config.save_pretrained(folder)
    elif config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
        if generation_config is not None:
            generation_config.save_pretrained(folder)
    if holds_codes(model) if coded is None else coded:
        write_coded(model, folder / CODED)
    else:
        write_weights(tensors_of(model), folder / WEIGHTS)
    describe(model, folder, manifest or {})


VOLATILE = {"architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", KEY, QUANTIZATION}


def differs(config: Any, folder: Path) -> bool:
    """True if a model's configuration says another architecture than the folder's config.json."""
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        return True
    kept = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    return any(value != kept.get(name) for name, value in config.to_dict().items() if name not in VOLATILE)


def describe(model: nn.Module, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `tersor.json` for a model whose other files are all there, and what transformers is to know (notice.py);
    `manifest` holds more keys."""
    packed = packed_sites(model)
    if packed or (folder / CODED).exists():
        post(folder)
    is_transformers = (folder / "config.json").exists()
    about = {"class": type(model).__name__} if is_transformers else {"class": type(model).__name__, "factory": None}
    content = {
        "tersor": VERSION,
        "model": about,
        "sites": {
            site.name: {
                "format": weight.format.name,
                "shape": list(site.shape),
                "dtype": str(site.dtype).removeprefix("torch."),
                "view": site.fold.view,
                "weight_shape": list(site.fold.weight_shape),
                "activation": quantizer.format if quantizer else None,
            }
            for site, weight, quantizer in packed
        },
        **manifest,
        "files": listing(folder),
    }
    write_manifest(folder, content)


OWN_MODEL = Rule("an instance of the module to fill", lambda value: isinstance(value, nn.Module))
TYPE = Rule("a type such as torch.bfloat16", lambda value: isinstance(value, torch.dtype))


@checked(model=OWN_MODEL, dtype=TYPE)
def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    packed: bool = True,
    dtype: torch.dtype | None = None,
    lazy: bool = False,
) -> nn.Module:
    """The model of an artifact, in eval mode. A Hugging Face model comes back as its own class; so does one that
    `tersor pack` made smaller, with the weights it had.

    Args:
        model: for an artifact of a custom model: a fresh instance to fill (its weights are replaced); it stays on its
            device.
        packed: keep weights packed in memory; False decodes them into ordinary parameters.
        dtype: type the model computes in; `torch.bfloat16` opens the kernels that multiply packed weights (see
            docs/static-int8.md). None: as it was saved.
        lazy: leave the sites of a `model.tersor` in the file and decode each whenever it runs, which is slower, with
            hardly more memory than one site takes.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, or does not fit the model.
        InputError: `dtype` is no floating-point type, or `lazy` is asked of weights that are not entropy-coded, or not
            to stay packed.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"dtype={dtype} is no floating-point type; give for example torch.bfloat16")
    folder = Path(folder)
    check_links(folder)
    if (folder / CODED).exists() and not (folder / MANIFEST).exists():
        if lazy:
            raise InputError(f"{folder}: packed without loss; lazy=True is for the packed sites of an artifact")
        return unpacked(folder, model).to(dtype=dtype)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    device = torch.device("cpu")
    if model is None:
        model = skeleton(folder, manifest)
    else:
        device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
        model.to("cpu")
    stored = read_stored(folder, manifest, model, packed=packed, lazy=lazy)
    place_packed(model, manifest, stored, packed=packed)
    fill(model, stored)
    return model.to(device=device, dtype=dtype).eval()


@dataclass
class StoredTensors:
    """The tensors of an artifact's weights file; each is taken out when it has found its place in the model.

    Attributes:
        place: where they come from, for messages.
        tensors: tensors by name. Those on the meta device have only a type and a shape.
        matrices: float matrices that packed weights were decoded to already, by parameter.
        lazy: the file that packed weights stay in, and are read from whenever they run.
        decoded: the sites whose weights were placed as ordinary parameters.
    """

    place: Path
    tensors: dict[str, Tensor]
    matrices: dict[str, Tensor] = field(default_factory=dict)
    lazy: LazyContainer | None = None
    decoded: list[Site] = field(default_factory=list)


def read_stored(
    folder: Path, manifest: Mapping[str, Any], model: nn.Module, *, packed: bool = True, lazy: bool = False
) -> StoredTensors:
    """Read the weights file of an artifact of `model`; arguments as those of `load`.

    Raises ArtifactError for a damaged file, InputError for a `lazy` that does not go with it.
    """
    weights = weights_path(folder, manifest)
    if lazy:
        if weights.name != CODED or not packed:
            raise InputError(f"{weights}: only entropy-coded weights that stay packed can be left in the file")
        container = LazyContainer(weights)
        return StoredTensors(folder, container.tensors(), lazy=container)
    if weights.name == CODED and not packed:
        sites = find_sites(model)
        coded = [site for site in sites if manifest["sites"].get(site.name, {}).get("format") == "coded"]
        return StoredTensors(folder, *read_decoded(weights, {site.parameter: site.shape for site in coded}))
    return StoredTensors(folder, read_tensors(weights))


def place_packed(model: nn.Module, manifest: Mapping[str, Any], stored: StoredTensors, *, packed: bool = True) -> None:
    """Put the packed weights that a manifest lists into a model, which may be a skeleton; all else stays as it is.

    Args:
        stored: loses the tensors that were placed.
        packed: False decodes each into an ordinary parameter.

    Raises ArtifactError for a site that the model does not have, or tensors that do not fit the format.
    """
    sites = {site.name: site for site in find_sites(model)}
    for site in sites.values():
        if site.name in manifest["sites"] or site.parameter in stored.tensors:
            site.materialize(model)
    for name, entry in manifest["sites"].items():
        if name not in sites:
            raise ArtifactError(
                f"{stored.place}: the manifest names the site {name}, which {type(model).__name__} does not have"
            )
        site = sites[name]
        restore_site(model, site, entry, stored.tensors, packed, stored.matrices.pop(site.parameter, None))
        if stored.lazy is not None:
            stored.lazy.serve(model, site)
        stored.decoded += [] if packed else [site]
    if packed:
        guard(model, save_into)


def fill(model: nn.Module, stored: StoredTensors, *, partly: bool = False) -> None:
    """Fill all that is not packed, from the tensors that `place_packed` left over.

    Args:
        partly: the model may have tensors that are not stored, such as a new head, which stay as they are.

    Raises ArtifactError where a tensor is missing, left over, or of another shape or kind.
    """
    tensors = stored.tensors if stored.lazy is None else stored.lazy.decoded(stored.tensors)
    others = other_tensors(model, stored.decoded)
    places = {name: place for name, place in others.items() if name in tensors} if partly else others
    restore_rest(model, tensors, places, stored.place)


def unpacked(folder: Path, model: nn.Module | None) -> nn.Module:
    """A checkpoint that `tersor pack` made, as a model; `model` is a fresh instance of one that is no transformers'.

    Raises:
        ArtifactError, ModelError: it is damaged, or does not fit the model.
    """
    if model is None:
        return open_transformers(str(folder), folder).model
    try:
        model.load_state_dict(read_state(folder / CODED))
        check_finite(dict(model.named_parameters()), str(folder))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"{folder}: does not fit {type(model).__name__}: {reason}") from None
    return model.eval()
