"""A scheme: what is done to one site. `[method:]format[/activation]`, or `keep`.

int4-g64                    the format's usual method
hqq:int4-g64-asym           a method by name
magnitude(sparsity=0.7):bitmask
int8/int8-dynamic           int8 weights, inputs quantized to int8 when the site runs
int8-dynamic                short for the line above
keep                        left as it is
"""

import ast
import re
from dataclasses import dataclass, fields

from tersor.activations import activation_named
from tersor.errors import InputError, UnknownName
from tersor.formats import FORMATS, format_named
from tersor.formats.bitmask import Bitmask
from tersor.formats.contract import Format
from tersor.formats.int_group import IntGroup
from tersor.methods import METHODS
from tersor.methods.contract import Method

SHORTHANDS = {"int8-dynamic": "int8/int8-dynamic"}
KEEP = "keep"


def usual_method(format: Format) -> str:
    """The method a format gets when none is named."""
    if isinstance(format, Bitmask):
        return "magnitude"
    return "mse" if isinstance(format, IntGroup) else "nearest"


@dataclass(frozen=True)
class Scheme:
    """A method, the format it fills, and how the site's input is quantized (None: float).

    >>> str(Scheme.parse("int8-dynamic"))
    'mse:int8/int8-dynamic'
    >>> Scheme.parse("magnitude(sparsity=0.7):bitmask").method
    Magnitude(sparsity=0.7)
    """

    method: Method
    format: Format
    activation: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Raises UnknownName with the nearest name, or InputError when method and format do not go together."""
        spelled = SHORTHANDS.get(text.strip(), text.strip())
        head, _, activation = spelled.partition("/")
        before, colon, after = head.rpartition(":")
        if not colon and after not in FORMATS and after.split("(")[0] in METHODS:
            raise InputError(f"'{text}' names a method without a format; write for example '{after}:int4-g64'")
        format = format_named(after.strip())
        method = parse_method(before.strip() or usual_method(format))
        problem = method.accepts(format)
        if problem:
            raise InputError(f"'{text}': {problem}")
        if activation:
            activation_named(activation)
        return cls(method, format, activation or None)

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self.method, f.name)}"
            for f in fields(self.method)  # type: ignore[arg-type]
            if getattr(self.method, f.name) != f.default
        ]
        arguments = f"({', '.join(changed)})" if changed else ""
        activation = f"/{self.activation}" if self.activation else ""
        return f"{self.method.name}{arguments}:{self.format.name}{activation}"


def parse_method(text: str) -> Method:
    """`hqq` or `magnitude(sparsity=0.7)`."""
    match = re.fullmatch(r"([\w-]+)(?:\((.*)\))?", text)
    if not match:
        raise InputError(f"'{text}' is not a method; write 'name' or 'name(option=value)'")
    name, arguments = match.groups()
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    known = {f.name: f.type for f in fields(METHODS[name])}  # type: ignore[arg-type]
    options: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in (arguments or "").split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise UnknownName(f"option of {name}", key, known)
        try:
            number = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            number = None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise InputError(f"{name}: {key}={value} is not a number")
        if known[key] in (int, "int") and not isinstance(number, int):
            raise InputError(f"{name}: {key}={value} is not a whole number")
        options[key] = number
    return METHODS[name](**options)


def parse_rule(text: str | None) -> Scheme | None:
    """A scheme, or None for `keep`."""
    return None if text is None or text.strip() == KEEP else Scheme.parse(text)
