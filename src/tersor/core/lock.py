"""Files that a process holds while it works. The system lets go of them when the process ends, however it ends."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def holder() -> dict[str, Any]:
    """The description of this process that a lock holds."""
    return {"process": os.getpid(), "host": socket.gethostname()}


@contextmanager
def held(path: Path, **about: Any) -> Iterator[None]:
    """Hold the file `path`, which is created if need be, while the block runs; it then names this process, and `about`.

    Raises BlockingIOError when another process holds it.
    """
    handle = open_locked(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(holder() | about).encode())
        yield
    finally:
        os.close(handle)


def open_locked(path: Path) -> int:
    """The file, opened and locked, and still the one of that name."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who held it before has removed it meanwhile


def is_held(path: Path) -> bool:
    """True if a process holds the file. A file that cannot be asked counts as held."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def told_by(path: Path) -> dict[str, Any]:
    """The description of the process that holds a lock or held it last; empty if the file has none."""
    with suppress(OSError, ValueError):
        about = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(about, dict):
            return about
    return {}
