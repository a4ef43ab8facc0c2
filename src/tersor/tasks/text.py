"""Reading text: whole files, passages, and the fallback text that every Python carries with it.

A *passage* is a paragraph (between blank lines); in a file without blank lines, a line.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tersor.core.errors import DataError

DOCSTRING_LENGTH = (80, 2000)  # characters: shorter ones say little, longer ones are cut
MAX_DOCSTRINGS = 2000


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; DataError when it is missing, a folder, unreadable or empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a file") from None
    if not data:
        raise DataError(f"{path}: the file is empty")
    return data


def read_text(path: Path) -> str:
    """A UTF-8 text file (a byte-order mark is dropped, line ends become `\\n`); DataError names the first bad line."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file first: "
            f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: the file holds only white space")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def passages(text: str) -> list[str]:
    """Paragraphs of a text; its lines when no line is blank.

    >>> passages("one\\ntwo\\n \\nthree"), passages("one\\ntwo")
    (['one\\ntwo', 'three'], ['one', 'two'])
    """
    parts = re.split(r"\n[^\S\n]*\n", text.strip())
    if len(parts) == 1:
        parts = text.split("\n")
    return [part.strip() for part in parts if part.strip()]


def fingerprint(path: Path) -> str:
    """sha256 of a file's bytes; of a folder: of its files' sorted relative names and bytes."""
    if not path.is_dir():
        return hashlib.sha256(read_bytes(path)).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(path).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def fingerprint_texts(texts: Sequence[str]) -> str:
    """sha256 of texts that come from no single file."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@cache
def standard_library_docstrings(limit: int = MAX_DOCSTRINGS) -> tuple[str, ...]:
    """Docstrings of the Python standard library: English technical prose that needs no download.

    The top-level modules are parsed (never imported) in the order of their names, so one Python version always gives
    the same list, without repeats. At most `limit` passages of 80 to 2,000 characters, in about a second.
    """
    shortest, longest = DOCSTRING_LENGTH
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for docstring in _docstrings(file):
            if len(docstring) >= shortest:
                found.setdefault(docstring[:longest].strip())
            if len(found) >= limit:
                return tuple(found)
    if not found:
        raise DataError("this Python has no standard library sources to take calibration text from; give a data file")
    return tuple(found)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and docstring.isascii():
                yield docstring
