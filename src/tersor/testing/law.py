"""Laws, and the sentences they break with.

A law is a function that takes an entry (a format, a method, a task, a client) and what to try it on, and raises
`LawBroken` with a sentence for whoever wrote the entry: what was done, what came out, and what should have.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from tersor.core.errors import TersorError
from tersor.core.messages import first_line

Law = Callable[..., None]


class LawBroken(TersorError, AssertionError):
    """Raised when a method, format, task or exporter breaks a law of its kind."""


def hold(kept: bool, sentence: str) -> None:
    """Raises LawBroken with the sentence unless the law is kept."""
    if not kept:
        raise LawBroken(sentence)


@contextmanager
def speaking_of(subject: str) -> Iterator[None]:
    """Whatever goes wrong inside is said of `subject`: a broken law, and any error that the entry raises by itself."""
    try:
        yield
    except LawBroken as broken:
        raise LawBroken(f"{subject}: {broken}") from broken
    except Exception as error:
        raise LawBroken(f"{subject}: it raises {type(error).__name__}: {first_line(error)}") from error


def check_cases(law: Law, subject: str, cases: Mapping[str, Any], *entries: object) -> None:
    """One law for an entry on every case: what `law` takes after the entries, by a name that messages give.

    Raises LawBroken for the first case that breaks it.
    """
    for name, case in cases.items():
        with speaking_of(f"{subject} on {name}"):
            law(*entries, *(case if isinstance(case, tuple) else (case,)))


def share(cases: Mapping[str, Any], of: int, *entries: object) -> dict[str, Any]:
    """Every `of`-th case, a different share for other entries, so that the lines of a table together meet all."""
    of = min(of, len(cases))
    return dict(list(cases.items())[crc32(repr(entries).encode()) % of :: of]) if cases else {}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are equal to the last bit, signs of zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def same_parts(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """The same tensors by the same names, to the last bit."""
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def hold_same(found: Tensor, expected: Tensor, sentence: str) -> None:
    """Raises LawBroken unless two tensors are equal to the last bit; says the first place where they differ."""
    if not same_bits(found, expected):
        raise LawBroken(f"{sentence}: {difference(found, expected)}")


def hold_same_parts(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], sentence: str) -> None:
    """Raises LawBroken unless two sets of tensors are equal to the last bit; names the first that is not."""
    hold(found.keys() == expected.keys(), f"{sentence}: {listed(found)} instead of {listed(expected)}")
    for name, tensor in expected.items():
        hold_same(found[name], tensor, f"{sentence}: {name}")


def difference(found: Tensor, expected: Tensor) -> str:
    """The first place where two tensors that are not the same differ, and both values there."""
    if found.dtype != expected.dtype:
        return f"{found.dtype} instead of {expected.dtype}"
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    pairs = zip(found.flatten(), expected.flatten(), strict=True)
    place = next((i for i, (a, b) in enumerate(pairs) if not same_bits(a, b)), 0)
    values = (tensor.flatten()[place].item() for tensor in (found, expected))
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), expected.shape)]
    return f"at {index} {next(values)!r} instead of {next(values)!r}"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence.

    >>> listed(["scale", "codes"]), listed([])
    ('codes, scale', 'nothing')
    """
    return ", ".join(sorted(names)) or "nothing"
