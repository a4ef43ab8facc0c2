"""Options of methods, transforms and observers: each of the type that its field has."""

from dataclasses import dataclass
from typing import Literal

import pytest

from tersor.core.errors import InputError
from tersor.schemes.scheme import parse_options, spell_options


@dataclass(frozen=True)
class Made:
    """One option of each type; the words of a Literal may be those of types."""

    kind: Literal["print", "int"] = "int"
    on: bool = True
    rounds: int | None = None
    share: float = 1.0
    word: str = "a"

    name = "made"


TABLE = {"made": Made}


def test_each_type_is_read_and_spelled():
    text = "made(kind=print, on=False, rounds=3, share=0.25, word=int8)"
    made = parse_options("method", TABLE, text)
    assert made == Made("print", False, 3, 0.25, "int8")
    assert spell_options(made) == text
    assert spell_options(parse_options("method", TABLE, "made(share=0)")) == "made(share=0)"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("kind=float", "made: kind=float is not 'print' or 'int'"),
        ("on=maybe", "made: on=maybe is not true or false"),
        ("rounds=0.5", "made: rounds=0.5 is not a whole number"),
        ("share=True", "made: share=True is not a number"),
        ("share=inf", "made: share=inf is not a number"),
    ],
)
def test_a_wrong_type_is_said(option, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_options("method", TABLE, f"made({option})")
