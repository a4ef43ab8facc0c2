"""Integers, entropy-coded: matrices of codes at the cost of their own probabilities.

Written for the codes of entropy-coded quantization (Fischer and Wang 1992, https://doi.org/10.1109/18.119735; for
trained weights Wiedemann et al. 2019, DeepCABAC, https://arxiv.org/abs/1905.08318), and as good for pruned weights
and for positions in a codebook: a zero costs what its probability says. Rows and columns have scale classes
(classes.py), classes have static frequency tables (tables.py), and chunks of rows are coded one apart from the other
(rans.py), so that they decode in parallel and at random access.

A value far from all others is an escape and written out. Where values are too wide for a table, their lowest bits are
kept as they are.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from tersor.codecs.bits import read_varint, write_varint
from tersor.codecs.chunk import decode_chunk, encode_chunk
from tersor.codecs.contract import PendingTensor, Pieces
from tersor.codecs.head import read_head, write_head
from tersor.codecs.plan import Plan, best_plan, make_plan, plan_bits
from tersor.codecs.rans import Scales
from tersor.codecs.tables import TableSet
from tersor.core.errors import ArtifactError

EXPANSION = 1024  # values a byte can stand for, at most
KINDS: dict[torch.dtype, type[np.integer]] = {
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
}


class Integers:
    """The codec `integers`.

    Args:
        tables: a set that several tensors share.
        scales: of the rows and the columns of a matrix, float32: it is decoded to float32, every integer times the
            product of its two scales, which is rounded to float32 before.
    """

    name = "integers"
    has_head = True
    trellis = False

    def __init__(self, tables: TableSet | None = None, scales: Scales | None = None):
        self.tables, self.scales = tables, scales

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in KINDS

    def encode(self, tensor: Int[Tensor, "..."]) -> Pieces:
        values = as_matrix(tensor)
        return pieces_of(values, make_plan(values))

    def decode(
        self, head: memoryview, chunks: Sequence[memoryview], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> PendingTensor:
        scales = self.scales
        check_size(shape, len(head) + sum(map(len, chunks)))
        known = read_head(bytes(head), matrix_shape(shape), dtype, self.tables, self.trellis)
        # torch's memory: numpy asks for huge pages, and can wait long for the system to clear some.
        values = torch.empty(known.shape, dtype=dtype if scales is None else torch.float32).numpy()
        rows = row_blocks(known.shape[0], known.chunk_rows)
        if len(rows) != len(chunks):
            raise ArtifactError(f"{len(chunks)} chunks for {len(rows)} blocks of rows")
        if scales is not None and shape[0] == 1:  # a single row is coded as a column
            scales = (scales[1], scales[0])
        parts = [None if scales is None else (scales[0][block], scales[1]) for block in rows]
        tasks = [
            partial(decode_chunk, known, chunk, block, values[block], KINDS[dtype], part)
            for chunk, block, part in zip(chunks, rows, parts, strict=True)
        ]
        return PendingTensor(torch.from_numpy(values).view(shape), tasks, rows)


def encode(codes: Int[Tensor, "..."]) -> bytes:
    """Integers of up to 32 bits, in as many axes as you like, as bytes that `decode` alone can read."""
    pieces = Integers().encode(codes)
    kind = list(KINDS).index(codes.dtype)
    numbers = [kind, codes.dim(), *codes.shape, len(pieces.head), len(pieces.chunks), *map(len, pieces.chunks)]
    return b"".join([*map(write_varint, numbers), pieces.head, *pieces.chunks])


def decode(data: bytes) -> Int[Tensor, "..."]:
    """The inverse. Raises ArtifactError for damaged bytes."""
    place = 0

    def number() -> int:
        nonlocal place
        value, place = read_varint(data, place)
        return value

    kind, num_axes = number(), number()
    if kind >= len(KINDS) or num_axes > 8:
        raise ArtifactError(f"integers of kind {kind} in {num_axes} axes")
    shape = tuple(number() for _ in range(num_axes))
    head_length, num_chunks = number(), number()
    if num_chunks > len(data):
        raise ArtifactError(f"{num_chunks} chunks in {len(data)} bytes")
    lengths = [head_length, *(number() for _ in range(num_chunks))]
    if place + sum(lengths) != len(data):
        raise ArtifactError(f"{len(data)} bytes, and {place + sum(lengths)} are described")
    parts = []
    for length in lengths:
        parts.append(memoryview(data)[place : place + length])
        place += length
    decoding = Integers().decode(parts[0], parts[1:], list(KINDS)[kind], shape)
    for task in decoding.tasks:
        task()
    return decoding.tensor


def estimate_bits(codes: Int[Tensor, "..."]) -> float:
    """Bits that the codes will take in a file, within half a percent, without coding anything."""
    return plan_bits(best_plan(as_matrix(codes)))


def pieces_of(values: Int[ndarray, "out in"], plan: Plan, shared: bool = False) -> Pieces:
    """The matrix, coded as planned; with `shared`, under tables that are kept elsewhere."""
    rows = row_blocks(len(values), plan.lanes_and_rows[1])
    return Pieces(write_head(plan, shared), [encode_chunk(plan, values[block], block) for block in rows])


def as_matrix(codes: Int[Tensor, "..."]) -> Int[ndarray, "out in"]:
    """The tensor as the 2-D matrix that the coder sees."""
    return codes.detach().cpu().contiguous().view(matrix_shape(tuple(codes.shape))).numpy()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor: the first axis and all others; a single row is coded as a column.

    >>> matrix_shape((8, 3, 3, 3)), matrix_shape((5,)), matrix_shape((1, 7)), matrix_shape(())
    ((8, 27), (5, 1), (7, 1), (1, 1))
    """
    num_rows, num_columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return (num_columns, 1) if num_rows == 1 else (num_rows, num_columns)


def row_blocks(num_rows: int, chunk_rows: int) -> list[slice]:
    """The rows of every chunk."""
    return [slice(first, min(first + chunk_rows, num_rows)) for first in range(0, num_rows, chunk_rows)]


def check_size(shape: tuple[int, ...], num_bytes: int) -> None:
    """Raises ArtifactError for more values than so many bytes can stand for, before memory is taken for them."""
    if math.prod(max(1, length) for length in shape) > EXPANSION * num_bytes:
        raise ArtifactError(f"{num_bytes} bytes cannot hold {' x '.join(map(str, shape))} values")
