"""The manifest `tersor.json`: what an artifact says about itself, checked before anything else is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from tersor.checkpoint.layout import CODED
from tersor.checkpoint.seal import MANIFEST, VERSION, as_text
from tersor.core.errors import ArtifactError
from tersor.core.files import sha256
from tersor.core.messages import first_line, first_mistake

WEIGHTS = "model.safetensors"


class SiteEntry(BaseModel):
    """The manifest's entry for one site."""

    format: str
    shape: tuple[int, int]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    view: Literal["rows", "transposed", "stack"]
    weight_shape: tuple[int, ...]
    activation: str | None


class ModelEntry(BaseModel):
    """The manifest's entry for the model."""

    name: str = Field(alias="class")
    factory: str | None = None


class FileEntry(BaseModel):
    """The manifest's entry for one file."""

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """The keys of `tersor.json` that loading relies on; more are allowed. `files` lists every other file of the folder;
    in older artifacts, that of the weights alone."""

    model: ModelEntry
    sites: dict[str, SiteEntry]
    files: dict[str, FileEntry]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `tersor.json` and check the keys that loading relies on. Raises ArtifactError."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {MANIFEST}, so not a tersor artifact") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({first_line(error)})") from None
    version = manifest.get("tersor") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise ArtifactError(f"{path}: written by format version {version}; this tersor reads {VERSION}")
    try:
        Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_mistake(error)}; not a manifest that this tersor can read") from None
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless the weights file exists, is complete, and has the recorded hash."""
    path = weights_path(folder, manifest)
    entry = manifest["files"].get(path.name, {})
    if not path.is_file():
        raise ArtifactError(f"{path}: missing from the artifact")
    if path.stat().st_size != entry.get("bytes"):
        raise ArtifactError(
            f"{path}: {path.stat().st_size} bytes, but {entry.get('bytes')} were written; copy it again"
        )
    if sha256(path) != entry.get("sha256"):
        raise ArtifactError(f"{path}: the sha256 differs from the one in {MANIFEST}; the file was changed or damaged")


def weights_path(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """The file with the tensors."""
    return folder / weights_name(manifest)


def weights_name(manifest: Mapping[str, Any]) -> str:
    """The name of the file with the tensors, entropy-coded or not."""
    return CODED if CODED in manifest["files"] else WEIGHTS


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `tersor.json`."""
    (folder / MANIFEST).write_text(as_text(content), encoding="utf-8")
