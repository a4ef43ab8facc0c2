"""The list of the files that tersor wrote into a folder, with size and sha256.

An artifact has it in `tersor.json`, under `files`; any other folder that tersor writes, such as an export, in
`tersor-files.json`. Only a folder that holds nothing but what its list names is ever replaced.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.core.errors import ArtifactError
from tersor.core.files import sha256
from tersor.core.messages import first_line

VERSION = 1  # of both
MANIFEST, SEAL = "tersor.json", "tersor-files.json"
OWN_HASH = "sha256"  # the key of the hash that a record has of all else in it
RECORDS = (MANIFEST, SEAL)  # either holds the list, and is not in it
Listed = dict[str, dict[str, Any]]


def listing(folder: Path, known: Mapping[str, Any] = {}) -> Listed:
    """Size and sha256 of every file in the folder, however deep, but the one that holds the list.

    Args:
        known: entries to take over for files that are there.
    """
    names = sorted(name for name in names_in(folder) if name not in RECORDS and (folder / name).is_file())
    return {name: dict(known[name]) if name in known else entry_of(folder / name) for name in names}


def entry_of(path: Path) -> dict[str, Any]:
    """The hash and the size of one file, as a list of files holds them."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def names_in(folder: Path) -> Iterator[str]:
    """Everything in a folder, by its path from there: files, links, and folders that hold nothing."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(place) / name).relative_to(folder).as_posix()
        if not folders and not files and Path(place) != folder:
            yield Path(place).relative_to(folder).as_posix()


def seal(folder: Path) -> None:
    """List every file of a folder that is complete: in its manifest, if it is an artifact, else in `tersor-files.json`.

    Entries that are listed already are not computed again.
    """
    try:
        record = next((folder / name for name in RECORDS if (folder / name).exists()), folder / SEAL)
        content: dict[str, Any] = {"tersor": VERSION, "files": {}}
        if record.exists():
            content = json.loads(record.read_text(encoding="utf-8"))
        files = listing(folder, content["files"])
        if not record.exists() or files.keys() != content["files"].keys():
            record.write_text(as_text(content | {"files": files}), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error}") from None


def as_text(content: Mapping[str, Any]) -> str:
    """The text of a file with a list: the content, and last a hash of it."""
    kept = {key: value for key, value in content.items() if key != OWN_HASH}
    digest = hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
    return json.dumps(kept | {OWN_HASH: digest}, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Checked:
    """The result of a check of all files of a folder in which none differs.

    Attributes:
        is_whole: every file is listed; in artifacts of earlier versions the weights alone are.
        unlisted: files that the list does not name.
    """

    is_whole: bool
    unlisted: tuple[str, ...] = ()


def check_sealed(folder: Path) -> Checked:
    """Compare every file of a folder with its list, and the list with the hash that it holds of itself.

    Raises:
        ArtifactError: a file differs, or is not there; names it.
    """
    record = next((folder / name for name in RECORDS if (folder / name).exists()), None)
    listed = listed_in(folder)
    if record is None:
        return Checked(False)
    if listed is None:
        raise ArtifactError(f"{record}: no list of files can be read in it; it was changed or damaged")
    try:
        if OWN_HASH not in json.loads(record.read_text(encoding="utf-8")) and len(listed) == 1:
            return Checked(False)
        if not is_as_written(record):
            raise ArtifactError(f"{record}: is not as it was written; it was changed or damaged")
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{path}: missing; {record.name} lists it")
            if entry_of(path) != entry:
                raise ArtifactError(f"{path}: changed or damaged; {record.name} lists another sha256")
        names = sorted(name for name in names_in(folder) if name not in listed and name != record.name)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder}: cannot be read ({first_line(error)})") from None
    return Checked(True, tuple(names))


def listed_in(folder: Path) -> Listed | None:
    """The folder's list; None for a folder that has none, or one that cannot be read."""
    return recorded_in(folder)[1]


def recorded_in(folder: Path) -> tuple[str, Listed | None]:
    """The name of the file that holds the folder's list, and the list; no name and None where none can be read."""
    for record in RECORDS:
        if not (folder / record).is_file():  # a pipe would be waited for
            continue
        try:
            content = json.loads((folder / record).read_text(encoding="utf-8"))
            files = content["files"].items()
            return record, {str(name): {"sha256": e["sha256"], "bytes": e["bytes"]} for name, e in files}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue
    return "", None


def is_as_written(record: Path) -> bool:
    """True if a file with a list has the hash that it gives itself. Raises OSError, ValueError."""
    text = record.read_text(encoding="utf-8")
    return text.rstrip() == as_text(json.loads(text)).rstrip()


def first_foreign(folder: Path) -> str | None:
    """A sentence on the first file of a folder that tersor did not write, or that was changed since.

    None if every file, the list itself too, is as it was written, and for an empty folder."""
    if not folder.is_dir():
        return "it is no folder"
    record, listed = recorded_in(folder)
    try:
        for name in sorted(names_in(folder)):
            path = folder / name
            if listed is None:
                return f"it holds {name}, and no list of files that tersor wrote"
            if name == record and path.is_file() and not path.is_symlink():
                changed = not is_as_written(path)
            elif name not in listed or path.is_symlink() or not path.is_file():
                return f"it holds {name}, which tersor did not write"
            else:
                changed = path.stat().st_size != listed[name]["bytes"] or sha256(path) != listed[name]["sha256"]
            if changed:
                return f"{name} in it was changed since tersor wrote it"
    except OSError as error:
        return f"{error.filename} in it cannot be read"
    return None
