"""The jobs of `tersor pack`, `unpack` and `verify`: files made smaller without loss, back, and checked."""

from dataclasses import dataclass
from pathlib import Path

from tersor.analysis.coding import Verified
from tersor.analysis.coding import verify as verify_folder
from tersor.checkpoint.pack import PackedFolder
from tersor.checkpoint.pack import pack as pack_folder
from tersor.checkpoint.pack import unpack as unpack_folder
from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.exporters import EXPORTS
from tersor.exporters.contract import Filed
from tersor.jobs.settings import Output
from tersor.runtimes.exactness import exactness


def pack(model: Path, output: Output) -> PackedFolder:
    """Write a Hugging Face folder, a safetensors file or an artifact entropy-coded, every bit as it was."""
    return pack_folder(model, output.path, overwrite=output.overwrite)


def unpack(packed: Path, output: Output) -> PackedFolder:
    """Write plain safetensors; the packed weights of an artifact are decoded."""
    return unpack_folder(packed, output.path, overwrite=output.overwrite)


@dataclass(frozen=True)
class VerifiedFile:
    """The check of a file that tersor exported for a runtime.

    Attributes:
        marked: None if the file is as tersor wrote it, else why that is not known.
        products: a sentence on whether this processor computes its int8 products exactly.
    """

    file: Path
    num_bytes: int
    marked: str | None
    products: str


def verify_file(file: Path, events: Events = Events()) -> VerifiedFile:
    """Check the hashes an exported file carries, and try if this processor multiplies its int8 weights exactly.

    Raises InputError for a file that tersor does not write.
    """
    client = next((each for each in EXPORTS.values() if each.suffix == file.suffix and isinstance(each, Filed)), None)
    if client is None:
        raise InputError(f"{file}: not an artifact, and not a file that tersor writes for a runtime")
    marked, known = client.foreign(file), exactness(file)
    if marked is not None:
        events.on_note(f"{file}: {marked}, so its bytes cannot be checked")
    products = str(known) if known is not None else NO_PRODUCTS
    return VerifiedFile(file, file.stat().st_size, marked, products)


NO_PRODUCTS = "none of its products overflows: it adds int8 products in 32 bits, or multiplies floats"


def verify(artifact: Path, events: Events = Events()) -> Verified:
    """Check the hash of every file, and of a `model.tersor` every checksum and every value. Raises ArtifactError."""
    found = verify_folder(artifact)
    if found.checked is not None and not found.checked.is_whole:
        events.on_note("only the weights could be checked: this folder has no list of all its files")
    for name in found.checked.unlisted if found.checked else ():
        events.on_note(f"{name}: not listed, so it could not be checked")
    return found
