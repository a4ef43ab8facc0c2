"""An artifact written anew in a client's layout, with exactly the values that were chosen."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tersor.activations import Activation
from tersor.checkpoint.artifact import atomic_folder, check_output, load
from tersor.checkpoint.layout import kept_tensors, packed_sites
from tersor.checkpoint.manifest import MANIFEST, read_manifest
from tersor.errors import ArtifactError, FormatError, InputError, ModelError
from tersor.export import export_named
from tersor.export.contract import Checkpoint, Export, PackedSite
from tersor.export.folder import PROVENANCE


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        output: the folder or file.
        to: the client's name in the table.
        num_bytes: of everything written.
        formats: what was stored for each site, as recipes spell it.
        notes: what the user should know, such as a value the client rounds.
    """

    output: Path
    to: str
    num_bytes: int
    formats: dict[str, str]
    notes: tuple[str, ...]


def export_model(artifact: str | Path, output: str | Path, *, to: str, overwrite: bool = False) -> Exported:
    """Write the artifact folder `artifact` as `output`, which `to` (a name in `EXPORTS`) loads unchanged.

    Raises:
        UnknownName: no such client.
        InputError: the artifact holds no Hugging Face model, or the output is in the way.
        FormatError: the client cannot hold a site, or the model; the message names the rule to change.
        MissingExtra: the client's package is needed to write, and is not installed.
    """
    export, artifact, output = export_named(to), Path(artifact), Path(output)
    check_place(output, export, overwrite)
    if not (artifact / MANIFEST).exists():
        raise InputError(f"{artifact}: no {MANIFEST}, so not a tersor artifact; make one with `tersor compress` first")
    checkpoint = open_checkpoint(artifact)
    check_sites(checkpoint, export)
    with atomic(output, export, overwrite) as working:
        notes = tuple(export.write(checkpoint, working))
        files = working.rglob("*") if working.is_dir() else [working]
        num_bytes = sum(file.stat().st_size for file in files if file.is_file())
    formats = {packed.site.name: packed.scheme for packed in checkpoint.sites}
    return Exported(output, export.name, num_bytes, formats, notes)


def open_checkpoint(artifact: Path) -> Checkpoint:
    """Load an artifact of a Hugging Face model."""
    if not (artifact / "config.json").exists():
        kind = read_manifest(artifact)["model"].get("class")
        raise InputError(f"{artifact} holds a custom model ({kind}); the clients read Hugging Face models only")
    model = load(artifact)
    sites = tuple(
        PackedSite(site, packed.encoded, Activation(quantizer.format, quantizer.tensors) if quantizer else None)
        for site, packed, quantizer in packed_sites(model)
    )
    return Checkpoint(artifact, model, sites, kept_tensors(model))


def check_sites(checkpoint: Checkpoint, export: Export) -> None:
    """Before anything is written: every site fits, and the model as a whole."""
    if not checkpoint.quantized:
        raise ModelError(f"{checkpoint.folder}: no weight is quantized, so there is nothing to export to {export.name}")
    misfits = [(packed, misfit) for packed in checkpoint.sites if (misfit := export.misfit(packed))]
    if misfits:
        packed, misfit = misfits[0]
        others = f" ({len(misfits) - 1} more sites do not fit either)" if misfits[1:] else ""
        raise FormatError(
            f"{export.name} holds {misfit.holds}; {packed.site.name} is {packed.scheme}{others}; "
            f"compress again with --rule '{packed.site.name}={misfit.instead}'"
        )
    export.check(checkpoint)


def check_place(output: Path, export: Export, overwrite: bool) -> None:
    """Before any work: the output can be written, and nothing but an earlier export or a file of its kind is lost."""
    if export.suffix and output.suffix != export.suffix:
        raise InputError(f"{output}: {export.name} writes one file; name it {output.with_suffix(export.suffix)}")
    if overwrite and export.suffix and output.is_file():
        return
    check_output(output, overwrite, PROVENANCE)


@contextmanager
def atomic(output: Path, export: Export, overwrite: bool) -> Iterator[Path]:
    """Where to write: it takes the place of `output` when the block ends well, and vanishes when it does not."""
    if not export.suffix:
        with atomic_folder(output, overwrite, PROVENANCE) as working:
            yield working
        return
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as folder:
            working = Path(folder) / output.name
            yield working
            with working.open("rb") as file:
                os.fsync(file.fileno())
            working.replace(output)
    except OSError as error:
        raise ArtifactError(f"{output}: cannot be written: {error}") from None
