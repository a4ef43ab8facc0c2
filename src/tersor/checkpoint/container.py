"""The coded container `model.tersor`: named tensors, entropy-coded without loss, in one file (docs/formats.md).

    0    b"tersor\\0" and the version of the format, 1
    8    length of the file                                                u64
    16   length of the header as it is stored, and inflated                u32, u32
    24   number of chunks                                                  u32
    28   CRC32 of the 28 bytes before, the header and the chunk index      u32
    32   the header: JSON, deflated (zlib)
         the chunk index: length and CRC32 of every chunk                  u32, u32
         the chunks
    -32  SHA-256 of all bytes before

Numbers are little-endian. Everything is checked before it is used, every chunk before it is decoded: a damaged file is
an error that names the tensor and the chunk. Files of version 1 will always be read.
"""

import hashlib
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tersor.checkpoint.views import BytePacking
from tersor.codecs import CODECS
from tersor.codecs.bits import BitReader
from tersor.codecs.contract import CodecJob, PendingTensor
from tersor.codecs.integers import Integers
from tersor.codecs.tables import TableSet, read_tables
from tersor.core.errors import ArtifactError
from tersor.core.messages import first_line, first_mistake
from tersor.core.weights_file import DTYPE_NAMES

MAGIC = b"tersor\0"
VERSION = 1
FIXED = struct.Struct("<7sBQIIII")
TRAILER = 32
ALIGNMENT, ALIGNED_BYTES = 64, 4096
LARGEST_HEADER = 2**28
WORTH_A_THREAD = 2**13  # bytes of a tensor; smaller ones would wait longer for each other than they take
LARGEST_TENSOR = 2**42
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Entry(BaseModel):
    """One tensor as the header describes it. Its chunks follow those of the entry before."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    dtype: str
    shape: list[int] = Field(max_length=8)
    codec: str
    chunks: int = Field(ge=0, lt=2**32)
    packed: BytePacking | None = None


class Header(BaseModel):
    """The JSON header of a `model.tersor`: its tensors, and how they are coded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tensors: list[Entry]
    tables: bool = False  # whether the first chunk is a set of tables that tensors share
    metadata: dict[str, str] = {}


@dataclass(frozen=True)
class Chunk:
    """A range of bytes in a file, and their CRC32."""

    first: int
    length: int
    crc: int

    @property
    def end(self) -> int:
        return self.first + self.length


class Container:
    """An open `model.tersor`: the header is checked, chunks are checked and decoded when they are asked for.

    Raises:
        ArtifactError: here, or when a tensor is asked for, when the file is damaged; names the tensor and the chunk.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: cannot be read ({first_line(error)})") from None
        self.header, chunks, self.header_bytes = read_header(self.data, path)
        self.tables: TableSet | None = None
        if self.header.tables:
            what = "the shared tables"
            data = bytes(self.checked(chunks.pop(0), what))
            try:
                self.tables = read_tables(BitReader(data))
            except ArtifactError as error:
                raise ArtifactError(f"{path}: {what}: {error}") from None
        self.entries = {entry.name: entry for entry in self.header.tensors}
        self.chunks: dict[str, Sequence[Chunk]] = {}
        first = 0
        for entry in self.header.tensors:
            self.chunks[entry.name] = chunks[first : first + entry.chunks]
            first += entry.chunks

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor's chunks take in the file."""
        return sum(chunk.length for chunk in self.chunks[name])

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor."""
        return self.tensors([name])[name]

    def tensors(
        self,
        names: Sequence[str] | None = None,
        num_threads: int | None = None,
        scales: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors by name, all of them by default, their chunks decoded side by side.

        Args:
            scales: of the rows `[out]` and the columns `[in]` of some integer matrices, by name: those come back as
                float32, each value times the product of its two scales, without integers in between.
        """
        decodings: dict[str, PendingTensor] = {}
        large: list[CodecJob] = []
        for name in self.entries if names is None else names:
            decodings[name] = self.decoding(name, (scales or {}).get(name))
            if self.stored_bytes(name) < WORTH_A_THREAD:
                for task in decodings[name].tasks:
                    task()
            else:
                large += decodings[name].tasks
        if num_threads == 1 or len(large) < 2:
            for task in large:
                task()
        else:
            with ThreadPoolExecutor(num_threads or num_cores()) as pool:
                list(pool.map(lambda task: task(), large))
        return {name: self.finished(name, decoding) for name, decoding in decodings.items()}

    def check(self, num_threads: int | None = None) -> None:
        """Read everything: the hash, every chunk's checksum, and every value."""
        for name in self.entries:
            self.tensors([name], num_threads)
        self.check_hash()

    def check_hash(self) -> None:
        """Hold the hash at the end of the file against all bytes before."""
        if hashlib.sha256(self.data[:-TRAILER]).digest() != bytes(self.data[-TRAILER:]):
            raise ArtifactError(f"{self.path}: the SHA-256 at its end differs; the file was changed or damaged")

    def decoding(self, name: str, scales: tuple[Tensor, Tensor] | None = None) -> PendingTensor:
        """A tensor to be filled. Raises ArtifactError for a name that is not there."""
        if name not in self.entries:
            raise ArtifactError(f"{self.path}: has no tensor {name}")
        entry, chunks = self.entries[name], self.chunks[name]
        codec = CODECS[entry.codec]
        if isinstance(codec, Integers):
            rows_and_columns = None if scales is None else (scales[0].numpy(), scales[1].numpy())
            codec = type(codec)(self.tables, rows_and_columns)
        head, blocks = memoryview(b""), list(chunks)
        if codec.has_head:
            head = self.checked(blocks.pop(0), f"{name}, its head")
        shape, dtype = tuple(entry.shape), DTYPES[entry.dtype]
        try:
            if entry.packed is not None:
                shape, dtype = (entry.packed.rows(shape), entry.packed.columns), torch.int8
            decoding = codec.decode(head, [self.bytes(chunk) for chunk in blocks], dtype, shape)
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {name}: {error}") from None
        tasks = [
            partial(self.run, task, chunk, f"{name}, chunk {i + 1} of {len(blocks)}")
            for i, (task, chunk) in enumerate(zip(decoding.tasks, blocks, strict=True))
        ]
        return replace(decoding, tasks=tasks)

    def finished(self, name: str, decoding: PendingTensor) -> Tensor:
        """The finished tensor, in the dtype and shape that were written, after its tasks have run."""
        packed = self.entries[name].packed
        if packed is None:
            return decoding.tensor
        try:
            return packed.packed(decoding.tensor, tuple(self.entries[name].shape))
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {name}: {error}") from None

    def run(self, task: CodecJob, chunk: Chunk, what: str) -> None:
        """Check a chunk, and decode it."""
        self.checked(chunk, what)
        try:
            task()
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {what} (bytes {chunk.first} to {chunk.end}): {error}") from None

    def checked(self, chunk: Chunk, what: str) -> memoryview:
        """The bytes of a chunk, after its CRC32 has been checked."""
        data = self.bytes(chunk)
        if zlib.crc32(data) != chunk.crc:
            place = f"{self.path}: {what} (bytes {chunk.first} to {chunk.end})"
            raise ArtifactError(f"{place}: the checksum differs; the file was damaged, copy it again")
        return data

    def bytes(self, chunk: Chunk) -> memoryview:
        """A chunk's bytes, unchecked."""
        return self.data[chunk.first : chunk.end]


def read(path: Path, num_threads: int | None = None) -> dict[str, Tensor]:
    """All tensors of a file. Raises ArtifactError when it is damaged anywhere."""
    container = Container(path)
    tensors = container.tensors(num_threads=num_threads)
    container.check_hash()
    return tensors


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_header(data: memoryview, path: Path) -> tuple[Header, list[Chunk], int]:
    """The header, the chunks, and how many bytes come before these. Raises ArtifactError unless all of it fits."""
    if len(data) < FIXED.size + TRAILER or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ArtifactError(f"{path}: not a model.tersor file, or one cut off after {len(data)} bytes")
    _, version, num_bytes, stored, inflated, num_chunks, crc = FIXED.unpack(data[: FIXED.size])
    if version != VERSION:
        raise ArtifactError(
            f"{path}: version {version} of the format; this tersor reads {VERSION}, a newer one may more"
        )
    if num_bytes != len(data):
        raise ArtifactError(f"{path}: {len(data)} bytes, and {num_bytes} were written; copy it again")
    first = FIXED.size + stored + 8 * num_chunks
    if first + TRAILER > len(data) or inflated > LARGEST_HEADER:
        raise ArtifactError(f"{path}: {len(data)} bytes do not hold a header of {stored} bytes and {num_chunks} chunks")
    if zlib.crc32(data[FIXED.size : first], zlib.crc32(data[: FIXED.size - 4])) != crc:
        raise ArtifactError(f"{path}: the checksum of its header differs; the file was damaged, copy it again")
    header = parse_header(data[FIXED.size : FIXED.size + stored], inflated, path)
    index = data[FIXED.size + stored : first].cast("B")
    pairs = list(struct.iter_unpack("<II", index))
    if sum(entry.chunks for entry in header.tensors) + header.tables != num_chunks:
        raise ArtifactError(f"{path}: its tensors do not have {num_chunks} chunks")
    chunks: list[Chunk] = []
    place = first
    for (length, chunk_crc), aligned in zip(pairs, alignments(header, pairs), strict=True):
        start = -(-place // ALIGNMENT) * ALIGNMENT if aligned else place
        if start + length + TRAILER > len(data) or any(data[place:start]):
            raise ArtifactError(
                f"{path}: chunk {len(chunks) + 1} of {num_chunks}, {length} bytes, is not where it should be"
            )
        chunks.append(Chunk(start, length, chunk_crc))
        place = start + length
    if place + TRAILER != len(data):
        raise ArtifactError(f"{path}: {len(data) - place - TRAILER} bytes belong to no chunk")
    return header, chunks, first


def parse_header(stored: memoryview, num_bytes: int, path: Path) -> Header:
    """The JSON header. Raises ArtifactError for anything that a writer does not make."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(stored, num_bytes + 1)
        if len(text) != num_bytes or not inflater.eof or inflater.unused_data:
            raise ValueError(f"it does not inflate to {num_bytes} bytes")
        header = Header.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path}: its header is not one: {first_mistake(error)}") from None
    except (ValueError, zlib.error, RecursionError) as error:
        raise ArtifactError(f"{path}: its header cannot be read ({first_line(error)})") from None
    names: set[str] = set()
    for entry in header.tensors:
        if entry.name in names:
            raise ArtifactError(f"{path}: two tensors are called {entry.name}")
        names.add(entry.name)
        check_entry(entry, path)
    return header


def check_entry(entry: Entry, path: Path) -> None:
    """Raises ArtifactError for a tensor whose codec, type and shape do not go together."""
    dtype, codec = DTYPES.get(entry.dtype), CODECS.get(entry.codec)
    if dtype is None or codec is None:
        raise ArtifactError(
            f"{path}: {entry.name}: {entry.dtype} by the codec {entry.codec}, which this tersor has not"
        )
    if entry.packed is not None and (dtype != torch.uint8 or entry.codec != "integers"):
        raise ArtifactError(f"{path}: {entry.name}: packed codes of {entry.dtype} by the codec {entry.codec}")
    if not codec.takes(dtype) or entry.chunks < codec.has_head:
        raise ArtifactError(f"{path}: {entry.name}: {entry.dtype} in {entry.chunks} chunks by the codec {entry.codec}")
    if any(length < 0 for length in entry.shape) or math.prod(max(1, n) for n in entry.shape) > LARGEST_TENSOR:
        raise ArtifactError(f"{path}: {entry.name}: the shape {entry.shape}")


def alignments(header: Header, pairs: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """Yields for each chunk if it begins at a multiple of `ALIGNMENT`: large ones of tensors stored as they are."""
    lengths = iter(length for length, _ in pairs)
    if header.tables:
        yield is_aligned("", next(lengths))
    for entry in header.tensors:
        for _ in range(entry.chunks):
            yield is_aligned(entry.codec, next(lengths))


def is_aligned(codec: str, num_bytes: int) -> bool:
    """Alignment check for one chunk; see `alignments`."""
    return codec == "raw" and num_bytes >= ALIGNED_BYTES
