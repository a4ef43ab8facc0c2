"""Files as bytes: their hash."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Hexadecimal hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
