"""Artifacts: folders that hold a compressed model and everything needed to load, check and explain it.

    model.safetensors   packed weights (see layout.py and docs/formats.md)
    tersor.json         the manifest: recipe, sites and their formats, versions, hashes, scorecards, verdict
    config.json, tokenizer files   as they came
    README.md           the model card

A folder is written under a temporary name beside its place and appears by one rename.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.activations import Activation, activation_named
from tersor.checkpoint.layout import other_tensors, packed_sites, tensors_of
from tersor.checkpoint.manifest import MANIFEST, VERSION, WEIGHTS, check_files, read_manifest, write_manifest
from tersor.checkpoint.source import first_line, quiet_transformers, sha256, transformers_class
from tersor.checkpoint.weights import read_weights, write_weights
from tersor.encoded import Encoded
from tersor.errors import ArtifactError, FormatError, InputError, ModelError, UnknownName
from tersor.formats import format_named
from tersor.sites import Site, find_sites

NOT_COPIED = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".h5",
    ".msgpack",
    ".gguf",
    ".ot",
    ".py",
    ".tflite",
}
OWN_FILES = {MANIFEST, "README.md", ".gitattributes"}


def save(
    model: nn.Module, folder: str | Path, *, source: Path | None = None, manifest: Mapping[str, Any] | None = None
) -> None:
    """Write `model`, packed weights and all, into `folder`, which is created if need be and should be empty.

    Args:
        source: folder whose config and tokenizer files are copied as they are; without it, or where the model's sizes
            are no longer those of its config, a transformers model writes its config itself.
        manifest: more keys for `tersor.json`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be created: {error.strerror}") from None
    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    if source is not None:
        copy_side_files(source, folder)
        if config is not None and differs(config, folder):
            config.save_pretrained(folder)
    elif config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
        if generation_config is not None:
            generation_config.save_pretrained(folder)
    write_weights(tensors_of(model), folder / WEIGHTS)
    describe(model, folder, manifest or {})


VOLATILE = {"architectures", "dtype", "transformers_version", "_name_or_path", "use_cache"}


def differs(config: Any, folder: Path) -> bool:
    """Whether a model's configuration says another architecture than the folder's config.json."""
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        return True
    kept = AutoConfig.from_pretrained(folder).to_dict()
    return any(value != kept.get(name) for name, value in config.to_dict().items() if name not in VOLATILE)


def describe(model: nn.Module, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `tersor.json` for a model whose other files are all there; `manifest` holds more keys."""
    is_transformers = (folder / "config.json").exists()
    about = {"class": type(model).__name__} if is_transformers else {"class": type(model).__name__, "factory": None}
    content = {
        "tersor": VERSION,
        "model": about,
        "sites": {
            site.name: {
                "format": packed.format.name,
                "shape": list(site.shape),
                "dtype": str(site.dtype).removeprefix("torch."),
                "view": site.fold.view,
                "weight_shape": list(site.fold.weight_shape),
                "activation": quantizer.format if quantizer else None,
            }
            for site, packed, quantizer in packed_sites(model)
        },
        **manifest,
        "files": {WEIGHTS: {"sha256": sha256(folder / WEIGHTS), "bytes": (folder / WEIGHTS).stat().st_size}},
    }
    write_manifest(folder, content)


def load(folder: str | Path, *, model: nn.Module | None = None, packed: bool = True) -> nn.Module:
    """The model of an artifact, in eval mode. A Hugging Face model comes back as its own class.

    Args:
        model: for an artifact of a custom model: a fresh instance to fill (its weights are replaced); it stays on its
            device.
        packed: keep weights packed in memory; False decodes them into ordinary parameters.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, or does not fit the model.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if model is None:
        model = skeleton(folder, manifest)
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    model.to("cpu")
    try:
        tensors = read_weights(folder / WEIGHTS)
    except ModelError as error:
        raise ArtifactError(str(error)) from None
    sites = {site.name: site for site in find_sites(model)}
    for name, entry in manifest["sites"].items():
        if name not in sites:
            raise ArtifactError(
                f"{folder}: the manifest names the site {name}, which {type(model).__name__} does not have"
            )
        restore_site(model, sites[name], entry, tensors, packed)
    decoded = [] if packed else [sites[name] for name in manifest["sites"]]
    restore_rest(model, tensors, other_tensors(model, decoded), folder)
    return model.to(device).eval()


def restore_site(
    model: nn.Module, site: Site, entry: Mapping[str, Any], tensors: dict[str, Tensor], packed: bool
) -> None:
    """Check one site's parts against its format's layout, and put them in place."""
    try:
        format, dtype = format_named(entry["format"]), getattr(torch, entry["dtype"])
        input_format = activation_named(entry["activation"]) if entry["activation"] else None
    except UnknownName as error:
        raise ArtifactError(f"{site.name}: {error}") from None
    if tuple(entry["shape"]) != site.shape:
        raise ArtifactError(f"{site.name}: stored as {tuple(entry['shape'])}, but the model has {site.shape} here")
    if (tuple(entry["weight_shape"]), entry["view"]) != (site.fold.weight_shape, site.fold.view):
        raise ArtifactError(
            f"{site.name}: stored for a weight {entry['weight_shape']}, but the model folds {site.fold}"
        )
    parts = {}
    for part, (part_dtype, shape) in format.layout(site.shape).items():
        tensor = tensors.pop(f"{site.parameter}.{part}", None)
        expected = f"{format.name} at {site.name}: part {part} should be {part_dtype} {shape}"
        if tensor is None:
            raise ArtifactError(f"{expected}, and the file does not have it")
        fits = tensor.dim() == len(shape) and all(e is None or e == s for e, s in zip(shape, tensor.shape, strict=True))
        if tensor.dtype != part_dtype or not fits:
            raise ArtifactError(f"{expected}, and the file has {tensor.dtype} {tuple(tensor.shape)}")
        parts[part] = tensor
    encoded = Encoded(format, site.shape, parts)
    check_values(site, encoded)
    if not packed:
        site.weight(model).data = site.fold.unfold(encoded.decode()).to(dtype)
        return
    activation = None
    if input_format:
        prefix = f"{site.parameter}.input."
        static = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in static.items()}
        promised = {name: (part_dtype, (1,)) for name, part_dtype in input_format.layout.items()}
        if found != promised:
            raise ArtifactError(f"{site.name}: {input_format.name} has the parameters {promised}, and the file {found}")
        activation = Activation(input_format.name, static)
    replace(site, dtype=dtype).replace(model, encoded, activation)


def check_values(site: Site, encoded: Encoded) -> None:
    """Parts whose size the values of others decide are judged by decoding; the shape decides all other parts."""
    if any(None in shape for _, shape in encoded.format.layout(encoded.shape).values()):
        try:
            encoded.decode()
        except FormatError as error:
            raise ArtifactError(f"{site.name}: {error}") from None


def restore_rest(model: nn.Module, tensors: dict[str, Tensor], rest: dict[str, Tensor], folder: Path) -> None:
    """Fill everything that is not packed; every tensor must find its place, and every place its tensor."""
    missing, unexpected = sorted(rest.keys() - tensors.keys()), sorted(tensors.keys() - rest.keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which the model does not have"
        raise ArtifactError(f"{folder / WEIGHTS}: {what}; the artifact and the model's code do not match")
    for name, tensor in rest.items():
        stored = tensors[name]
        alike = stored.dtype == tensor.dtype or (stored.is_floating_point() and tensor.is_floating_point())
        if tensor.shape != stored.shape or not alike:
            raise ArtifactError(
                f"{name}: stored as {stored.dtype} {tuple(stored.shape)}, "
                f"but the model has {tensor.dtype} {tuple(tensor.shape)}"
            )
        owner, _, attribute = name.rpartition(".")
        getattr(model.get_submodule(owner), attribute).data = stored


def skeleton(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """A Hugging Face model of the right class and shape, weights not initialized."""
    if not (folder / "config.json").exists():
        raise ArtifactError(
            f"{folder}: holds a custom model ({manifest['model'].get('class')}); "
            f"pass a fresh instance: tersor.load({str(folder)!r}, model=YourModel())"
        )
    import transformers
    from transformers.initialization import no_init_weights

    quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.architectures = [manifest["model"]["class"]]
        model_class = transformers_class(config)
        if model_class is transformers.AutoModel:
            raise ValueError(f"it has no class {manifest['model']['class']}")
        with torch.device("meta"):
            num_weights = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
        if num_weights > 8 * (folder / WEIGHTS).stat().st_size:
            raise ValueError(f"config.json describes {num_weights:,} weights, more than {WEIGHTS} has bits")
        with no_init_weights():
            model = model_class._from_config(config, dtype=config.dtype)
        model.tie_weights()
        if (folder / "generation_config.json").exists() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a garbled config trips over
        raise ArtifactError(f"{folder}: transformers cannot build the model: {first_line(error)}") from None
    return model


def copy_side_files(source: Path, folder: Path) -> None:
    """Config, tokenizer and pooling files as they came; weights and code stay behind."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        weights = path.suffix in NOT_COPIED or path.name.endswith(".index.json")
        if path.is_file() and not hidden and not weights and str(relative) not in OWN_FILES:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)


def check_output(folder: Path, overwrite: bool, marker: str = MANIFEST) -> None:
    """Before any work: the output can be written, and nothing of the user's is lost: a folder without the file
    `marker` is not tersor's."""
    if os.path.lexists(folder):
        if not overwrite:
            raise InputError(f"{folder} exists; choose another --output, or --overwrite it")
        if not (folder / marker).exists():
            raise InputError(
                f"{folder} is not a tersor artifact, so --overwrite does not touch it; choose another --output"
            )
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{folder}: the folder {parent} does not exist")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.absolute().name}.", dir=parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot write in {parent}: {error.strerror}; choose another --output") from None


@contextmanager
def atomic_folder(folder: Path, overwrite: bool = False, marker: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside `folder`: takes its place when the block ends well, vanishes when it does not."""
    check_output(folder, overwrite, marker)
    target = folder.absolute()
    try:
        working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield working
        umask = os.umask(0)
        os.umask(umask)
        for path in (working, *working.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)) / "old"
            try:
                target.rename(replaced)
                working.rename(target)
            finally:
                if not target.exists():
                    replaced.rename(target)
                shutil.rmtree(replaced.parent)
        else:
            working.rename(target)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
