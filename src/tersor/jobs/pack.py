"""The jobs of `tersor pack`, `unpack` and `verify`: files made smaller without loss, back, and checked."""

from pathlib import Path

from tersor.analysis.coding import Verified
from tersor.analysis.coding import verify as verify_folder
from tersor.checkpoint.pack import PackedFolder
from tersor.checkpoint.pack import pack as pack_folder
from tersor.checkpoint.pack import unpack as unpack_folder
from tersor.core.progress import Events
from tersor.jobs.settings import Output


def pack(model: Path, output: Output) -> PackedFolder:
    """Write a Hugging Face folder, a safetensors file or an artifact entropy-coded, every bit as it was."""
    return pack_folder(model, output.path, overwrite=output.overwrite)


def unpack(packed: Path, output: Output) -> PackedFolder:
    """Write plain safetensors; the packed weights of an artifact are decoded."""
    return unpack_folder(packed, output.path, overwrite=output.overwrite)


def verify(artifact: Path, events: Events = Events()) -> Verified:
    """Check the hash of every file, and of a `model.tersor` every checksum and every value. Raises ArtifactError."""
    found = verify_folder(artifact)
    if found.checked is not None and not found.checked.is_whole:
        events.on_note("only the weights could be checked: this folder has no list of all its files")
    for name in found.checked.unlisted if found.checked else ():
        events.on_note(f"{name}: not listed, so nothing is known of it")
    return found
