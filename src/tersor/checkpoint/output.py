"""Outputs: written whole or not at all, and replacing nothing but what tersor wrote.

Work is done in a hidden folder `.OUT.xxxxxxxx` beside OUT:

    lock      held while the run lives; says its process and host, and what OUT is
    new/      what will appear
    old/      what stood at OUT and is being replaced; put back if the run ends before the new is in place

A run that was killed leaves it behind, and the next one with the same output removes it.
"""

import glob
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tersor.checkpoint.seal import first_foreign, seal
from tersor.core.errors import ArtifactError, InputError
from tersor.core.lock import held, holder, is_held, told_by
from tersor.core.messages import first_line

LOCK, NEW, OLD = "lock", "new", "old"
finished: list[Path] = []  # the outputs that this process has put in place
Foreign = Callable[[Path], str | None]  # why what stands at an output is not tersor's to replace; None where it is


def check_output(output: Path, overwrite: bool, foreign: Foreign = first_foreign, beside: Sequence[str] = ()) -> None:
    """Check that the output can be written, nothing that tersor did not write is in the way, and no other run is
    writing it. What a killed run left is removed. Raises InputError."""
    target = place_of(output, overwrite)
    training = journal_of(target) / LOCK
    for lock in (*([training] if training.exists() and is_held(training) else []), *leftovers(target)):
        raise InputError(busy(output, lock))
    check_replaceable(output, overwrite, foreign, beside)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix_of(target), dir=target.parent) as place:
            (Path(place) / target.name).mkdir()
    except OSError as error:
        reason = f"cannot write in {target.parent}: {error.strerror}"
        raise InputError(f"{output}: {reason}; choose another --output") from None


@contextmanager
def claimed(
    output: Path, overwrite: bool, foreign: Foreign = first_foreign, beside: Sequence[str] = ()
) -> Iterator[None]:
    """Check an output as `check_output` does, and hold it until the block ends: another run with the same output is
    refused at its start, and not when its work is done. Raises InputError."""
    check_output(output, overwrite, foreign, beside)
    target = place_of(output, overwrite)
    with workplace(output, target) as place:
        for lock in leftovers(target):
            if lock.parent != place:
                raise InputError(busy(output, lock))
        yield


def check_replaceable(output: Path, overwrite: bool, foreign: Foreign, beside: Sequence[str] = ()) -> None:
    """Check that nothing stands at the output or at the files `beside` it, or only what may be replaced.

    Raises InputError.
    """
    target = place_of(output, overwrite)
    if not target.parent.is_dir():
        raise InputError(f"{output}: the folder {target.parent} does not exist")
    stands = os.path.lexists(target)
    if not overwrite or not stands:
        for name in ([output.name] if stands else []) + list(beside):
            if os.path.lexists(target.parent / name):
                way = "choose another --output" + ("" if overwrite else ", or --overwrite it")
                raise InputError(f"{output.parent / name} exists; {way}")
        return
    try:
        reason = foreign(target)
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
    if reason:
        raise InputError(
            f"{output}: {reason}, so --overwrite does not touch it; choose another --output, or delete it yourself"
        )


@contextmanager
def atomic_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`: takes its place when the block ends well, with a list of its files, and
    vanishes when it does not. What must not be replaced (`check_output` tells before the work) is left alone, and the
    finished work is then kept."""
    target = place_of(folder, overwrite)
    with workplace(folder, target) as place:
        working = place / NEW / target.name
        working.mkdir()
        yield working
        seal(working)
        flush_to_disk([working])
        replace(place, target, [working], overwrite, first_foreign)


@contextmanager
def atomic_file(output: Path, overwrite: bool, foreign: Foreign, beside: Sequence[str] = ()) -> Iterator[Path]:
    """A path to write to, in a temporary folder: the file takes the place of `output` when the block ends well, and
    those that were written beside it theirs; else as `atomic_folder`.

    Args:
        foreign: why an existing file is not tersor's to replace.
        beside: names of files that may be written beside it, and are replaced with it.
    """
    target = place_of(output, overwrite)
    with workplace(output, target) as place:
        yield place / NEW / target.name
        made = sorted((place / NEW).iterdir(), key=lambda path: path.name == target.name)  # what names the others: last
        flush_to_disk(made)
        replace(place, target, made, overwrite, foreign, beside)


def place_of(output: Path, overwrite: bool) -> Path:
    """The path that an output is written to; one that is replaced is found through its links.

    Raises InputError for a place that has no name to write to, such as `/`.
    """
    place = Path(os.path.realpath(output)) if overwrite else output.absolute()
    if place.name in ("", ".."):
        raise InputError(f"{output}: is no name for an output; choose another --output")
    return place


def short(name: str) -> str:
    """A name cut short, so that it fits into 255 bytes with a prefix and a suffix."""
    return os.fsdecode(os.fsencode(name)[:200])


def journal_of(output: Path) -> Path:
    """The folder beside an output where training keeps its checkpoints."""
    return output.with_name(f".{short(output.name)}.journal")


def busy(output: Path, lock: Path) -> str:
    """The error message for an output that another run is writing."""
    about = told_by(lock)
    who = f"process {about.get('process')} on {about.get('host')}"
    return f"{output}: {who} is writing it; wait for its end, or choose another --output"


def prefix_of(target: Path) -> str:
    """The beginning of the names of an output's temporary folders."""
    return f".{short(target.name)}."


def leftovers(target: Path) -> Iterator[Path]:
    """Remove what killed runs with this output left behind; the locks of those that live."""
    for lock in sorted(target.parent.glob(f"{glob.escape(prefix_of(target))}????????/{LOCK}")):
        about = told_by(lock)
        if about.get("output") != target.name or not {"process", "host"} <= about.keys():
            continue
        if is_held(lock):
            yield lock
        elif about["host"] != holder()["host"]:
            warnings.warn(
                f"{lock.parent} is left of process {about['process']} on {about['host']}; delete it if that has ended",
                stacklevel=2,
            )
        else:
            restore(lock.parent, target)
            discard(lock.parent)


@contextmanager
def workplace(output: Path, target: Path) -> Iterator[Path]:
    """The temporary folder of one run, locked; removed at the end, but for finished work that found its place taken."""
    try:
        for _ in leftovers(target):
            pass  # another run that lives: whoever ends first has the place
        place = Path(tempfile.mkdtemp(prefix=prefix_of(target), dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"{output}: cannot be written: {error.strerror}") from None
    try:
        with held(place / LOCK, output=target.name):
            (place / NEW).mkdir()
            yield place
    except Taken as taken:
        (place / LOCK).unlink()  # so that nobody takes it for what a killed run left
        place.chmod(0o777 & ~umask())
        raise InputError(
            f"{output}: {taken}, and is left alone; the finished work is in {place / NEW}: move it where you want it"
        ) from None
    except (OSError, SafetensorError) as error:  # the latter: what the system refused to those who write safetensors
        discard(place)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ArtifactError(f"{output}: cannot be written: {reason}") from None
    except BaseException as stop:
        discard(place)
        if not isinstance(stop, Exception):
            stop.add_note(f"{output} was not written")
        raise
    discard(place)


class Taken(Exception):
    """Raised when the path of the output is taken by something that must not be replaced."""


def flush_to_disk(paths: Sequence[Path]) -> None:
    """Give files and folders the usual permissions, and flush their bytes to disk."""
    mask = umask()
    for path in [each for made in paths for each in (made, *made.rglob("*"))]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        with open_to_flush(path) as handle:
            os.fsync(handle)


@contextmanager
def open_to_flush(path: Path) -> Iterator[int]:
    """Context with the descriptor of a file or folder, opened for reading."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def umask() -> int:
    """The process's umask: the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace(
    place: Path, target: Path, made: Sequence[Path], overwrite: bool, foreign: Foreign, beside: Sequence[str] = ()
) -> None:
    """Put what was made where it belongs, the target last. What stands there is first set aside, looked at once more,
    and put back if anything goes wrong. Raises Taken for what must not be replaced."""
    (place / OLD).mkdir()
    names = dict.fromkeys([target.name, *beside, *(path.name for path in made)]) if overwrite else {}
    try:
        for name in names:  # the target first: where it is missing, the old ones are put back
            if os.path.lexists(target.parent / name):
                (target.parent / name).rename(place / OLD / name)
        if any((place / OLD).iterdir()):
            found = place / OLD / target.name
            reason = foreign(found) if os.path.lexists(found) else f"{sorted(os.listdir(place / OLD))[0]} appeared"
            if reason:
                raise Taken(f"it was changed while the command ran ({reason})")
        for path in made:
            appear(path, target.parent / path.name)
    except BaseException:
        restore(place, target)
        raise
    (place / OLD).rename(place / "replaced")
    finished.append(target)


def restore(place: Path, target: Path) -> None:
    """Undo the replacement of an output by a run that failed, and put back the files that it set aside."""
    made = place / NEW / target.name
    if os.path.lexists(target) and (not made.exists() or is_same(made, target)):
        return  # the target is the last to appear
    for path in (place / NEW).glob("*"):
        if is_same(target.parent / path.name, path):
            (target.parent / path.name).unlink()
    for path in (place / OLD).glob("*"):
        if not os.path.lexists(target.parent / path.name):
            path.rename(target.parent / path.name)


def is_same(first: Path, second: Path) -> bool:
    """True if both paths exist and are the same file."""
    return first.exists() and second.exists() and os.path.samefile(first, second)


def discard(place: Path) -> None:
    """Remove a run's temporary folder, unless something that it set aside could not be put back."""
    if not any((place / OLD).glob("*")):
        shutil.rmtree(place, ignore_errors=True)


def appear(path: Path, target: Path) -> None:
    """Rename finished output to `target` if nothing has that name. Raises Taken otherwise."""
    try:
        if path.is_dir():
            path.rename(target)  # refused by the system where a file or a folder that is not empty has the name
        else:
            os.link(path, target)
    except OSError:
        if os.path.lexists(target):
            raise Taken(f"{target.name} appeared while the command ran") from None
        if path.is_dir():
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))  # a disk without links: take the name, then fill it
        os.replace(path, target)
