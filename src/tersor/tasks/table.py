"""Reading rows: csv, tab-separated and json-lines files with named columns.

A csv may start with a header (columns then come in any order, and others are ignored) or not (columns then come in the
order the task names them). In tab-separated files a quote is a plain character, as in the GLUE files.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.core.errors import DataError
from tersor.tasks.text import passages, read_text

Columns = Mapping[str, tuple[str, ...]]  # the task's name of a column -> the header names it goes by, lower case

TEXT_COLUMN = {"text": ("text", "sentence", "sentence1")}


@dataclass(frozen=True)
class Row:
    """One row: where it stood, and its cells under the task's column names."""

    line: int
    cells: dict[str, str]


def read_rows(path: Path, columns: Columns) -> list[Row]:
    """Rows of a `.csv`, `.tsv` or `.jsonl` file; at least one.

    Every cell is a non-blank string. DataError names the file, the line and what was expected.
    """
    text = read_text(path)
    rows = _json_rows(path, text, columns) if is_json_lines(path) else _csv_rows(path, text, columns)
    if not rows:
        raise DataError(f"{path}: a header but no rows; expected columns {_listing(columns)}")
    for row in rows:
        for name, cell in row.cells.items():
            _check_cell(path, row.line, name, cell)
    return rows


def read_texts(path: Path) -> list[str]:
    """Texts without labels: the passages of a plain text, or a table's `text` (or `sentence`) column."""
    if not is_table(path):
        return passages(read_text(path))
    return [row.cells["text"] for row in read_rows(path, TEXT_COLUMN)]


def is_json_lines(path: Path) -> bool:
    """True if the file's suffix is that of JSON lines."""
    return path.suffix.lower() in (".jsonl", ".ndjson", ".json")


def is_table(path: Path) -> bool:
    """True if a file is read as rows (anything else is plain text)."""
    return is_json_lines(path) or path.suffix.lower() in (".csv", ".tsv")


def to_number(path: Path, row: Row, name: str) -> float:
    """Parse a cell as a finite number. Raises DataError for anything else."""
    try:
        value = float(row.cells[name])
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{path}, line {row.line}: column '{name}' holds {row.cells[name][:40]!r}; expected a number")
    return value


def _csv_rows(path: Path, text: str, columns: Columns) -> list[Row]:
    tabs = path.suffix.lower() == ".tsv" or text.split("\n", 1)[0].count("\t") >= max(1, len(columns) - 1)
    style: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ",", "strict": True}
    )
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    rows: list[Row] = []
    places: dict[str, int] | None = None
    width = len(columns)
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if places is None:
                places = _header(fields, columns)
                if places is not None:
                    width = len(fields)
                    continue
                places = {name: index for index, name in enumerate(columns)}
            if len(fields) != width:
                raise DataError(_wrong_width(path, reader.line_num, len(fields), width, columns, tabs))
            rows.append(Row(reader.line_num, {name: fields[index] for name, index in places.items()}))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: malformed row ({error}); {_way_out(columns)}") from None
    return rows


def _header(fields: list[str], columns: Columns) -> dict[str, int] | None:
    """The place of each column if these fields are a header that names them all."""
    names = [field.strip().lower() for field in fields]
    places = {
        column: names.index(known)
        for column, synonyms in columns.items()
        for known in reversed(synonyms)
        if known in names
    }
    return places if len(places) == len(columns) else None


def _wrong_width(path: Path, line: int, got: int, width: int, columns: Columns, tabs: bool) -> str:
    kind = "tab-separated" if tabs else "comma-separated"
    return f"{path}, line {line}: {got} {kind} fields, expected {width}; {_way_out(columns)}"


def _way_out(columns: Columns) -> str:
    return f"columns are {_listing(columns)} (or name them in a header); quote fields that hold commas or quotes"


def _listing(columns: Columns) -> str:
    return ",".join(columns)


def _json_rows(path: Path, text: str, columns: Columns) -> list[Row]:
    rows = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON ({str(error)[:80]}); expected one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {line}: a JSON {type(record).__name__}; expected an object a line")
        rows.append(Row(line, {name: _json_cell(path, line, record, columns[name]) for name in columns}))
    return rows


def _json_cell(path: Path, line: int, record: dict[str, Any], synonyms: tuple[str, ...]) -> str:
    named = {key.strip().lower(): value for key, value in record.items()}
    for name in synonyms:
        if name in named:
            value = named[name]
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                break
            try:
                return str(value)
            except ValueError:  # an integer of thousands of digits
                break
    raise DataError(f"{path}, line {line}: no text or number under {' or '.join(map(repr, synonyms))}")


def _check_cell(path: Path, line: int, name: str, cell: str) -> None:
    if not cell.strip():
        raise DataError(f"{path}, line {line}: column '{name}' is empty; fill it or remove the row")
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}, line {line}: column '{name}' holds half a surrogate pair; expected UTF-8") from None
