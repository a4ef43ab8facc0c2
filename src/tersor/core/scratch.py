"""Room for temporary files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tersor.core.errors import InputError


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, gone when the block ends. Raises InputError where there is no place for one."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="tersor-")
    except OSError as error:
        raise InputError(no_room(error)) from None
    with folder as name:
        yield Path(name)


def no_room(error: OSError) -> str:
    """The message for a user whose system has no place for temporary files."""
    return f"no temporary file can be written ({error.strerror}); set TMPDIR to a folder with room for some"
