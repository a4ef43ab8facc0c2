"""A scheme: what is done to one site. `[method:]format[/[observer:]activation]`, or `keep`.

int4-g64                    the format's usual method: the best that the data at hand allows
hqq:int4-g64-asym           a method by name
magnitude(sparsity=0.7):bitmask
wanda:2:4                   a format may have a colon too (alone in YAML, quote it: '2:4')
int8/int8-dynamic           int8 weights, inputs quantized to int8 when the site runs
int8-dynamic                short for the line above
W8A8, W4A16, FP8_DYNAMIC, q4_0      names that other tools use (aliases.py)
int8/int8-static            the same with one scale for all inputs, chosen by calibration
int8/percentile:int8-static           ... by an observer by name
int8/percentile(percentile=99.9):int8-static
keep                        left as it is
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tersor.activations.observers import OBSERVERS, Observer
from tersor.activations.quantizers import ACTIVATIONS, IntStatic, activation_named
from tersor.core.errors import InputError, UnknownName
from tersor.formats import FORMATS, format_named
from tersor.formats.contract import Format
from tersor.methods import METHODS
from tersor.methods.contract import Method
from tersor.schemes.aliases import unaliased
from tersor.schemes.old_spellings import METHOD_NAMES, OPTION_NAMES, renamed

KEEP = "keep"


def usual_method(format: Format, sees_inputs: bool = False) -> str:
    """The method a format gets when none is named: the best there is without the inputs of a site, or with them."""
    usual = format.usual_methods
    return usual.with_inputs if sees_inputs else usual.without_inputs


@dataclass(frozen=True)
class Scheme:
    """A method, the format it fills, how the site's input is quantized (None: float), and the observer that chooses the
    range of a static one (None: the usual).

    >>> str(Scheme.parse("int8-dynamic"))
    'mse:int8/int8-dynamic'
    >>> Scheme.parse("magnitude(sparsity=0.7):bitmask").method
    Magnitude(sparsity=0.7)
    """

    method: Method
    format: Format
    activation: str | None = None
    observer: Observer | None = None

    @classmethod
    def parse(cls, text: str, sees_inputs: bool = False) -> "Scheme":
        """Raises UnknownName with the nearest name, or InputError when method and format do not go together.

        Args:
            sees_inputs: True if calibration shows the inputs of the site, which decides on the usual method.
        """
        before, after, activation = parts_of(text)
        if before is None and after not in FORMATS and renamed(METHOD_NAMES, after.split("(")[0], METHODS) in METHODS:
            raise InputError(f"'{text}' names a method without a format; write for example '{after}:int4-g64'")
        format = format_named(after)
        method = parse_method(before or usual_method(format, sees_inputs))
        problem = method.accepts(format)
        if problem:
            raise InputError(f"'{text}': {problem}")
        observer, colon, activation = activation.rpartition(":")
        if activation or colon:
            activation_named(activation)
        return cls(method, format, activation or None, parse_observer(observer, activation) if colon else None)

    def __str__(self) -> str:
        observer = f"{spell_options(self.observer)}:" if self.observer else ""
        activation = f"/{observer}{self.activation}" if self.activation else ""
        return f"{spell_options(self.method)}:{self.format.name}{activation}"


def parts_of(text: str) -> tuple[str | None, str, str]:
    """The parts of a scheme: its method (None if it names none), its format, and the rest."""
    head, slash, activation = text.strip().partition("/")
    # A method begins with a letter: the colon of `2:4` does not end one.
    before, after = re.fullmatch(r"(?:([A-Za-z_][^:]*)?:)?(.*)", head, re.DOTALL).groups()  # type: ignore[union-attr]
    format, has_activation, of_alias = unaliased(after.strip()).partition("/")
    if has_activation and slash:
        raise InputError(f"'{text}': {after.strip()} is short for {format}/{of_alias}; leave out '/{activation}'")
    return (before or "").strip() or None, format, of_alias or activation


def parse_observer(text: str, activation: str) -> Observer:
    """`percentile` or `percentile(percentile=99.9)`. Raises InputError for an activation format without a range to
    choose."""
    if not isinstance(activation_named(activation), IntStatic):
        static = ", ".join(name for name, each in ACTIVATIONS.items() if isinstance(each, IntStatic))
        raise InputError(f"'{text}:{activation}': observers choose the range of {static}; leave out '{text}:'")
    return parse_options("observer", OBSERVERS, text.strip())


def parse_method(text: str) -> Method:
    """Parse `hqq` or `magnitude(sparsity=0.7)` into a method."""
    return parse_options("method", METHODS, text)


def parse_options(kind: str, table: Mapping[str, type], text: str) -> Any:
    """`name` or `name(option=value, ...)`: an entry of a table of dataclasses, made with its options."""
    match = re.fullmatch(r"([\w-]+)(?:\((.*)\))?", text)
    if not match:
        raise InputError(
            f"'{text}' is not {'an' if kind[0] in 'aeiou' else 'a'} {kind}; write 'name' or 'name(option=value)'"
        )
    name, arguments = renamed(METHOD_NAMES, match[1], table), match[2]
    if name not in table:
        raise UnknownName(kind, name, table)
    types = get_type_hints(table[name])
    known = {field.name: types[field.name] for field in fields(table[name])}
    options: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in (arguments or "").split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        key = renamed(OPTION_NAMES, key, known)
        if key not in known:
            raise UnknownName(f"option of {name}", key, known)
        options[key] = parse_value(name, key, value, known[key])
    return table[name](**options)


def parse_value(name: str, key: str, value: str, annotation: Any) -> Any:
    """The value of an option, of the type that its field is annotated with. Raises InputError for any other.

    >>> parse_value("svd", "rank", "8", int), parse_value("mine", "signed", "false", bool)
    (8, False)
    """
    try:
        found = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_strings(value)
    except ValidationError as error:
        kinds = {mistake["type"].partition("_")[0]: mistake for mistake in error.errors()}
        wanted = next((said for kind, said in WANTED.items() if kind in kinds), None)
        if wanted is None:
            wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise InputError(f"{name}: {key}={value} is not {wanted}") from None
    whole = isinstance(found, float) and value.lstrip("+-").isdecimal()
    return int(found) if whole else found  # so that 0 is not spelled 0.0


WANTED = {"float": "a number", "finite": "a number", "int": "a whole number", "bool": "true or false"}


def spell_options(made: Any) -> str:
    """The text that `parse_options` reads: the name and the options that are not the usual ones."""
    changed = [f"{f.name}={getattr(made, f.name)}" for f in fields(made) if getattr(made, f.name) != f.default]
    return f"{made.name}({', '.join(changed)})" if changed else made.name


def parse_rule(text: str | None, sees_inputs: bool = False) -> Scheme | None:
    """Parse a rule's value: a scheme, or None for `keep`."""
    return None if text is None or text.strip() == KEEP else Scheme.parse(text, sees_inputs)


def in_full(text: str, sees_inputs: bool = False) -> str:
    """A scheme with its method by name.

    >>> in_full("int8-dynamic"), in_full("int8-dynamic", sees_inputs=True)
    ('mse:int8/int8-dynamic', 'gptq:int8/int8-dynamic')
    """
    return str(parse_rule(text, sees_inputs) or KEEP)


def as_written(text: str) -> str:
    """A scheme in its one spelling, without a method where it names none.

    >>> as_written(" int8-dynamic "), as_written("gptq( damping=0.02 ):int4")
    ('int8/int8-dynamic', 'gptq(damping=0.02):int4')
    """
    scheme = parse_rule(text)
    if scheme is None:
        return KEEP
    return str(scheme) if parts_of(text)[0] else str(scheme).removeprefix(f"{spell_options(scheme.method)}:")
