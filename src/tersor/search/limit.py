"""The limit a user sets: a size, a ratio, bits per weight, or the largest tolerated drop of the score."""

import re
from dataclasses import dataclass
from math import inf

from tersor.core.errors import InputError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Parse a size into bytes. Units are decimal, except KiB, MiB, GiB.

    >>> parse_size("8MB"), parse_size("1.5 MiB")
    (8000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    num_bytes = float(match[1]) * UNITS.get(match[2].lower(), 0) if match else 0
    if not 0 < num_bytes < inf:
        raise InputError(f"--size '{text}' is not a size; write for example 8MB, 700KB or 1.5GiB")
    return int(num_bytes)


def parse_ratio(text: str) -> float:
    """Parse a ratio: how many times smaller than the original.

    >>> parse_ratio("4x"), parse_ratio("6.5")
    (4.0, 6.5)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]?\s*", text)
    if not match or float(match[1]) < 1:
        raise InputError(f"--ratio '{text}' is not a ratio of at least 1; write for example 4x")
    return float(match[1])


@dataclass(frozen=True)
class Limit:
    """A size limit for the weights file, in bytes, and the text that the user gave."""

    num_bytes: int
    text: str

    @classmethod
    def of(
        cls,
        *,
        original_bytes: int,
        num_parameters: int,
        size: str | None = None,
        ratio: str | None = None,
        bits: float | None = None,
    ) -> "Limit | None":
        """The limit one of `size`, `ratio`, `bits` states; None when none is given. Two at once are refused.

        Args:
            original_bytes: size of the original weights, in the dtype they came in.
            num_parameters: all parameters of the model; `bits` are counted over all of them.
        """
        given = [name for name, value in (("size", size), ("ratio", ratio), ("bits", bits)) if value is not None]
        if len(given) > 1:
            raise InputError(f"--{given[0]} and --{given[1]} are both limits on the file size; give one")
        if size is not None:
            return cls(parse_size(size), f"size {size}")
        if ratio is not None:
            return cls(int(original_bytes / parse_ratio(ratio)), f"ratio {parse_ratio(ratio):g}x")
        if bits is not None:
            if not 0 < bits <= 32:
                raise InputError(f"--bits {bits} is not between 0 and 32; write for example 4.2")
            return cls(int(num_parameters * bits / 8), f"{bits:g} bits per parameter")
        return None
