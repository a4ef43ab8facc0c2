"""The table of formats. A new one is a file in this folder and a line here."""

from tersor.errors import UnknownName
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Format
from tersor.formats.float_cast import FloatCast
from tersor.formats.int_group import IntGroup

ROWS: list[Format] = [
    FloatCast("fp16"),
    FloatCast("bf16"),
    *(
        IntGroup(bits, group_size, symmetric)
        for bits in (8, 6, 5, 4, 3, 2)
        for group_size in (None, 128, 64, 32)
        for symmetric in (True, False)
    ),
    Bitmask(),
]
FORMATS = {format.name: format for format in ROWS}


def format_named(name: str) -> Format:
    """The format a recipe or an artifact names.

    >>> format_named("int4-g64-asym")
    IntGroup(bits=4, group_size=64, symmetric=False)
    >>> format_named("int4-g63")
    Traceback (most recent call last):
    tersor.errors.UnknownName: unknown format 'int4-g63': did you mean 'int4-g64'? list them with `tersor formats`
    """
    if name not in FORMATS:
        raise UnknownName("format", name, FORMATS, see="list them with `tersor formats`")
    return FORMATS[name]
