"""Small numbers as bits: what an entropy-coded tensor says about its tables and classes.

Bits fill a byte from its lowest one. Three ways to write a number: `n` bits as it is, lowest first; Rice codes (Rice
1979, https://ntrs.nasa.gov/citations/19790014634) for small non-negative ones; Elias gamma codes
(Elias 1975, https://doi.org/10.1109/TIT.1975.1055349) for numbers of any size.
"""

from functools import cached_property

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from tersor.core.errors import ArtifactError

LONGEST = 40  # bits of a number, and ones in a row, that a reader accepts


class BitWriter:
    """Bits one after another; `bytes()` of it fills the last byte with zeros."""

    def __init__(self) -> None:
        self.number, self.num_bits = 0, 0

    def raw(self, value: int, num_bits: int) -> None:
        """Write the lowest bits of a number."""
        self.number |= value << self.num_bits
        self.num_bits += num_bits

    def rice(self, value: int, k: int) -> None:
        """Write a number as a Rice code: `value >> k` ones, a zero, and the lowest k bits."""
        self.raw((1 << (value >> k)) - 1, (value >> k) + 1)
        self.raw(value & ((1 << k) - 1), k)

    def gamma(self, value: int) -> None:
        """Write a gamma code of a number from 0 on: a zero for each bit of `value + 1` but one, then its bits."""
        length = (value + 1).bit_length() - 1
        self.raw(1 << length, length + 1)
        self.raw((value + 1) & ((1 << length) - 1), length)

    def __bytes__(self) -> bytes:
        return self.number.to_bytes(-(-self.num_bits // 8), "little")


class BitReader:
    """The inverse. Raises ArtifactError beyond the end, and for numbers no writer makes."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    @cached_property
    def padded(self) -> UInt8[ndarray, " bytes"]:
        """All bytes followed by eight zero bytes, which the compiled loops need to read ahead."""
        return np.frombuffer(bytearray(self.data) + bytes(8), np.uint8)

    def raw(self, num_bits: int) -> int:
        """Read the next bits as a number."""
        first, end = self.place, self.place + num_bits
        if end > 8 * len(self.data):
            raise ArtifactError(f"ends after {len(self.data)} bytes, in the middle of a number")
        self.place = end
        part = int.from_bytes(self.data[first // 8 : -(-end // 8)], "little")
        return (part >> (first % 8)) & ((1 << num_bits) - 1)

    def gamma(self) -> int:
        """Read a number written by `BitWriter.gamma`."""
        first = self.place // 8
        part = int.from_bytes(self.data[first : first + 8], "little") >> (self.place % 8)
        length = (part & -part).bit_length() - 1 if part else LONGEST + 1
        if length > LONGEST:
            raise ArtifactError(f"a number of more than {LONGEST} bits")
        self.raw(length + 1)
        return ((1 << length) | self.raw(length)) - 1


def zigzag(value: int) -> int:
    """Whole numbers as non-negative ones: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...

    >>> [zigzag(value) for value in (0, -1, 1, -2)]
    [0, 1, 2, 3]
    """
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(number: int) -> int:
    """The inverse of `zigzag`."""
    return number >> 1 if number % 2 == 0 else -(number >> 1) - 1


def write_varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; the highest bit of a byte says that more follow.

    >>> write_varint(300).hex()
    'ac02'
    """
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def read_varint(data: bytes | memoryview, place: int) -> tuple[int, int]:
    """A number written by `write_varint`, and the place after it."""
    number, shift = 0, 0
    while place < len(data) and shift < 63:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
    raise ArtifactError(f"a number without an end at byte {place}")
