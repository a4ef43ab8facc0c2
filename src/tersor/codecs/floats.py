"""Floating-point numbers, entropy-coded without loss: the exponent by its probability, sign and mantissa as they are.

Exponents of trained weights take 2.6 bits instead of 8, whatever the type; mantissas and signs are as good as random
(Hershcovitch et al. 2024, ZipNN, https://arxiv.org/abs/2411.05239; Zhang et al. 2025, DFloat11,
https://arxiv.org/abs/2504.11651). Exponents are whole numbers, whose level follows the scale of the row and the column,
so they are coded as integers are. A mantissa whose lowest bytes are all zero, as in numbers that came from a narrower
type, does not store them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from tersor.codecs.bits import read_varint, write_varint
from tersor.codecs.chunk import decode_chunk, encode_chunk
from tersor.codecs.contract import Decoding, Pieces
from tersor.codecs.head import Head, read_head, write_head
from tersor.codecs.integers import check_size, matrix_shape, row_blocks
from tersor.codecs.loops import loops
from tersor.codecs.plan import CHUNK, Plan, lanes_and_rows, log_plan
from tersor.codecs.raw import bytes_of
from tersor.errors import ArtifactError


@dataclass(frozen=True)
class Split:
    """How a number's bits part into a symbol of 8 bits or fewer, and the rest.

    Attributes:
        integer: the type with as many bits.
        low: mantissa bits below the symbol.
        width: bits of the symbol: the exponent, and in narrow types the highest bits of the mantissa.
        per_octave: symbols to a factor of two.
    """

    integer: type
    low: int
    width: int
    per_octave: int

    @property
    def num_rest(self) -> int:
        """Bits of the rest: the mantissa below the symbol, then the sign above it."""
        return self.low + 1


SPLITS = {
    torch.float32: Split(np.uint32, 23, 8, 1),
    torch.bfloat16: Split(np.uint16, 7, 8, 1),
    torch.float16: Split(np.uint16, 7, 8, 8),
    torch.float8_e4m3fn: Split(np.uint8, 0, 7, 8),
    torch.float8_e5m2: Split(np.uint8, 0, 7, 4),
}


class Floats:
    """The codec `floats`."""

    name = "floats"
    has_head = True

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in SPLITS

    def encode(self, tensor: Float[Tensor, "..."]) -> Pieces:
        split = SPLITS[tensor.dtype]
        bits = bits_of(tensor)
        symbols, planes = parted(bits, split)
        plan = log_plan(symbols, split.per_octave)
        kept = [plane for plane in range(num_planes(split)) if planes[plane].any()]
        rows = row_blocks(len(bits), lanes_and_rows(bits.shape)[1])
        head = bytes([sum(1 << plane for plane in kept)]) + write_head(plan)
        return Pieces(head, [chunk_of(plan, symbols[block], planes[kept, block], block, split) for block in rows])

    def decode(
        self, head: memoryview, chunks: Sequence[memoryview], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Decoding:
        check_size(shape, len(head) + sum(map(len, chunks)))
        split = SPLITS[dtype]
        if not head or head[0] >= 1 << num_planes(split):
            raise ArtifactError("a head without a whole number of planes")
        kept = [plane for plane in range(num_planes(split)) if head[0] >> plane & 1]
        known = read_head(bytes(head[1:]), matrix_shape(shape), torch.uint8)
        values: ndarray = np.empty(known.shape, split.integer)
        rows = row_blocks(known.shape[0], known.chunk_rows)
        if len(rows) != len(chunks):
            raise ArtifactError(f"{len(chunks)} chunks for {len(rows)} blocks of rows")
        tasks = [
            partial(fill, known, part, block, values[block], kept, split)
            for part, block in zip(chunks, rows, strict=True)
        ]
        tensor = torch.from_numpy(values.view(np.uint8)).view(dtype).view(shape)
        return Decoding(tensor, tasks, rows)


def bits_of(tensor: Float[Tensor, "..."]) -> ndarray:
    """A tensor's bits as whole numbers, as the matrix that is coded."""
    shape = matrix_shape(tuple(tensor.shape))
    return np.frombuffer(bytes_of(tensor), SPLITS[tensor.dtype].integer).reshape(shape)


def parted(bits: ndarray, split: Split) -> tuple[UInt8[ndarray, "out in"], UInt8[ndarray, "plane out in"]]:
    """The symbols, and the bytes of the rest, lowest first: mantissa bits, and above them the sign."""
    symbols, planes = np.empty(bits.shape, np.uint8), np.empty((num_planes(split), *bits.shape), np.uint8)
    for block in row_blocks(len(bits), max(1, CHUNK // max(1, bits.shape[1]))):
        part = bits[block]
        symbols[block] = part >> split.low & ((1 << split.width) - 1)
        rest = (part & ((1 << split.low) - 1)) | (part >> (split.low + split.width) << split.low)
        for plane in range(len(planes)):
            planes[plane, block] = rest >> (8 * plane) & 255
    return symbols, planes


def num_planes(split: Split) -> int:
    """Bytes that hold the rest."""
    return -(-split.num_rest // 8)


def chunk_of(plan: Plan, symbols: ndarray, planes: ndarray, block: slice, split: Split) -> bytes:
    """Some rows: the length of their coded symbols, these, and those planes of the rest that are stored, one byte of
    each number in each; signs alone are eight to a byte."""
    coded = encode_chunk(plan, symbols, block)
    if split.num_rest == 1:
        planes = np.packbits(planes.reshape(len(planes), -1), axis=1, bitorder="little")
    return b"".join([write_varint(len(coded)), coded, planes.tobytes()])


def fill(head: Head, data: memoryview, block: slice, values: ndarray, kept: Sequence[int], split: Split) -> None:
    """Some rows back. Raises ArtifactError for damaged bytes."""
    length, place = read_varint(data, 0)
    per_plane = -(-values.size // 8) if split.num_rest == 1 else values.size
    if place + length + per_plane * len(kept) != len(data):
        raise ArtifactError(f"{len(data)} bytes for {length} of exponents and {len(kept)} planes of {per_plane}")
    symbols = np.empty(values.shape, np.uint8)
    decode_chunk(head, data[place : place + length], block, symbols, np.uint8)
    place += length
    planes = np.zeros((num_planes(split), values.size), np.uint8)
    for plane in kept:
        stored = np.frombuffer(data[place : place + per_plane], np.uint8)
        place += per_plane
        planes[plane] = stored if split.num_rest > 1 else np.unpackbits(stored, count=values.size, bitorder="little")
    if split.num_rest == 1:
        values[:] = symbols | (planes[0].reshape(values.shape) << split.width)
    else:
        join = loops().join16 if split.num_rest == 8 else loops().join32
        join(symbols.reshape(-1), planes, values.reshape(-1))
