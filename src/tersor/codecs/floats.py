"""Floating-point numbers, entropy-coded without loss: the exponent by its probability, sign and mantissa as they are.

Exponents of trained weights take 2.6 bits instead of 8, whatever the type; mantissas and signs are as good as random
(Hershcovitch et al. 2024, ZipNN, https://arxiv.org/abs/2411.05239; Zhang et al. 2025, DFloat11,
https://arxiv.org/abs/2504.11651). Exponents are whole numbers, whose level follows the scale of the row and the column,
so they are coded as integers are. Of numbers that came from a narrower type, the lowest bytes of the mantissa are all
zero and not stored, or far from random and coded, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from tersor.codecs.bits import read_varint, write_varint
from tersor.codecs.chunk import decode_chunk, encode_chunk
from tersor.codecs.contract import PendingTensor, Pieces
from tersor.codecs.head import Head, read_head, write_head
from tersor.codecs.integers import check_size, matrix_shape, row_blocks
from tersor.codecs.loops import loops
from tersor.codecs.plan import CHUNK, Plan, lanes_and_rows, log_plan, plan_bits
from tersor.codecs.raw import bytes_of
from tersor.core.errors import ArtifactError

MOST_PLANES = 3
ALMOST_RANDOM = 7.84  # bits of a byte, from where on it is stored as it is
LOOKED_AT = 2**14  # bytes together, to find rows that are not random among those that are
PER_ROW_CLASS = 32  # rows of bytes are classed by their means, four to a class


@dataclass(frozen=True)
class Split:
    """The split of a float's bits into a symbol of at most 8 bits, which is entropy-coded, and the rest.

    Attributes:
        integer: the integer type of the same width.
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
        plans = {plane: plan_of(planes[plane], split) for plane in range(num_planes(split)) if planes[plane].any()}
        rows = row_blocks(len(bits), lanes_and_rows(bits.shape)[1])
        chunks = [chunk_of(plan, symbols[block], plans, planes[:, block], block, split) for block in rows]
        return Pieces(head_of(plan, plans), chunks)

    def decode(
        self, head: memoryview, chunks: Sequence[memoryview], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> PendingTensor:
        check_size(shape, len(head) + sum(map(len, chunks)))
        split = SPLITS[dtype]
        kept, rest = read_planes(head, split, matrix_shape(shape))
        known = read_head(rest, matrix_shape(shape), torch.uint8)
        values: ndarray = np.empty(known.shape, split.integer)
        rows = row_blocks(known.shape[0], known.chunk_rows)
        if len(rows) != len(chunks):
            raise ArtifactError(f"{len(chunks)} chunks for {len(rows)} blocks of rows")
        tasks = [
            partial(fill, known, part, block, values[block], kept, split)
            for part, block in zip(chunks, rows, strict=True)
        ]
        tensor = torch.from_numpy(values.view(np.uint8)).view(dtype).view(shape)
        return PendingTensor(tensor, tasks, rows)


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
    """Number of bytes that hold the rest of a float."""
    return -(-split.num_rest // 8)


def plan_of(plane: UInt8[ndarray, "out in"], split: Split) -> Plan | None:
    """The plan for a plane of low bits; None if it is stored as it is, because coding would hardly make it smaller."""
    blocks = row_blocks(len(plane), max(1, LOOKED_AT // max(1, plane.shape[1])))
    if split.num_rest == 1 or sum(bits_in(plane[block]) for block in blocks) > ALMOST_RANDOM * plane.size:
        return None
    plan = log_plan(plane, PER_ROW_CLASS)
    return plan if plan_bits(plan) < ALMOST_RANDOM * plane.size else None


def bits_in(values: UInt8[ndarray, "rows in"]) -> float:
    """Bits that these bytes take when coded with a table of their own."""
    often = np.bincount(values.reshape(-1))
    often = often[often > 0]
    return float((often * (np.log2(values.size) - np.log2(often))).sum())


def head_of(plan: Plan, plans: Mapping[int, Plan | None]) -> bytes:
    """A byte that says which planes are stored, and which of them coded; the heads of these; that of the symbols."""
    heads = {plane: write_head(coded) for plane, coded in plans.items() if coded is not None}
    flags = sum(1 << plane for plane in plans) | sum(1 << plane + MOST_PLANES for plane in heads)
    return b"".join([bytes([flags]), *(write_varint(len(head)) + head for head in heads.values()), write_head(plan)])


def read_planes(head: memoryview, split: Split, shape: tuple[int, int]) -> tuple[dict[int, Head | None], bytes]:
    """Heads of the planes that `head_of` stored, and the head of the symbols. Raises ArtifactError."""
    flags = head[0] if head else 0
    stored, coded = flags & (1 << MOST_PLANES) - 1, flags >> MOST_PLANES
    if not head or stored >= 1 << num_planes(split) or coded & ~stored or (coded and split.num_rest == 1):
        raise ArtifactError("a head without a whole number of planes")
    kept: dict[int, Head | None] = {}
    place = 1
    for plane in range(num_planes(split)):
        if coded >> plane & 1:
            length, place = read_varint(head, place)
            kept[plane] = read_head(bytes(head[place : place + length]), shape, torch.uint8)
            place += length
        elif stored >> plane & 1:
            kept[plane] = None
    return kept, bytes(head[place:])


def chunk_of(
    plan: Plan, symbols: ndarray, plans: Mapping[int, Plan | None], planes: ndarray, block: slice, split: Split
) -> bytes:
    """Some rows: their coded symbols and those planes of the rest that are stored, one byte of each number in each, or
    coded as the symbols are; signs alone are eight to a byte. Before what is coded stands its length."""
    parts = [encode_chunk(plan, symbols, block)]
    parts.insert(0, write_varint(len(parts[0])))
    for plane, own in plans.items():
        if own is not None:
            coded = encode_chunk(own, np.ascontiguousarray(planes[plane]), block)
            parts += [write_varint(len(coded)), coded]
        elif split.num_rest == 1:
            parts.append(np.packbits(planes[plane].reshape(-1), bitorder="little").tobytes())
        else:
            parts.append(planes[plane].tobytes())
    return b"".join(parts)


def fill(
    head: Head, data: memoryview, block: slice, values: ndarray, kept: Mapping[int, Head | None], split: Split
) -> None:
    """Decode some rows into `values`. Raises ArtifactError for damaged bytes."""
    place = 0

    def part(length: int | None = None) -> memoryview:
        """The next bytes; without a length, as many as is said before them."""
        nonlocal place
        if length is None:
            length, place = read_varint(data, place)
        if length > len(data) - place:
            raise ArtifactError(f"ends after {len(data)} bytes, {place + length} are described")
        place += length
        return data[place - length : place]

    symbols = np.empty(values.shape, np.uint8)
    decode_chunk(head, part(), block, symbols, np.uint8)
    planes = np.zeros((num_planes(split), *values.shape), np.uint8)
    for plane, own in kept.items():
        if own is not None:
            decode_chunk(own, part(), block, planes[plane], np.uint8)
        elif split.num_rest == 1:
            signs = np.frombuffer(part(-(-values.size // 8)), np.uint8)
            planes[plane] = np.unpackbits(signs, count=values.size, bitorder="little").reshape(values.shape)
        else:
            planes[plane] = np.frombuffer(part(values.size), np.uint8).reshape(values.shape)
    if place != len(data):
        raise ArtifactError(f"{len(data)} bytes, {place} are described")
    if split.num_rest == 1:
        values[:] = symbols | (planes[0] << split.width)
    else:
        join = loops().join16 if split.num_rest == 8 else loops().join32
        join(symbols.reshape(-1), planes.reshape(len(planes), -1), values.reshape(-1))
