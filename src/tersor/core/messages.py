"""One line of an error, for messages of one line."""

from collections.abc import Sequence

from pydantic_core import ValidationError  # pydantic's own, which takes longer to import


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_mistake(error: ValidationError, kinds: Sequence[str] = ()) -> str:
    """The place of pydantic's first mistake, and what it is; `kinds` are the tags of a union, which are no place."""
    first = error.errors()[0]
    before_and_part = zip((None, *first["loc"]), first["loc"], strict=False)
    parts = [str(part) for before, part in before_and_part if not (isinstance(before, int) and part in kinds)]
    where = ".".join(parts) or "top level"
    if first["type"] == "union_tag_invalid":
        return f"{where}.step: '{first['ctx']['tag']}' is no kind of step; known: {', '.join(kinds)}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
