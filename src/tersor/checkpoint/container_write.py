"""Writing the coded container (container.py): every tensor by the codec that makes it smallest."""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from tersor.checkpoint.container import ALIGNMENT, FIXED, MAGIC, VERSION, Container, Entry, Header, is_aligned
from tersor.checkpoint.layout import CODED, packed_sites, tensors_of
from tersor.checkpoint.views import BytePacking, Packing
from tersor.codecs import ROWS
from tersor.codecs.bits import BitWriter
from tersor.codecs.contract import Pieces
from tersor.codecs.integers import Integers, as_matrix, pieces_of
from tersor.codecs.plan import Plan, best_plan, share_tables
from tersor.codecs.tables import TableSet, write_tables
from tersor.core.errors import ArtifactError
from tersor.core.scratch import scratch_folder
from tersor.core.weights_file import DTYPE_NAMES, METADATA, file_size

INDEX_BYTES = 8  # of a chunk


def write(
    tensors: Mapping[str, Tensor], path: Path, packing: Packing | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, which appears whole or not at all. Every tensor is looked up twice and dropped in between.

    Args:
        packing: of tensors of bytes that hold codes of a few bits: how many bits, and how many codes a row has.

    Raises:
        ArtifactError: the disk or the place refuses.
    """
    packing = packing or {}
    views = {name: BytePacking.of(tensors[name], *packing[name]) for name in tensors if name in packing}
    plans = {name: best_plan(as_matrix(numbers)) for name, numbers in integers_of(tensors, views)}
    tables, users = share_tables(plans)
    if tables is not None:
        plans |= {name: replace(plans[name], tables=tables) for name in users}
    try:
        with new_file(path) as file, tempfile.TemporaryFile(dir=path.absolute().parent) as spool:
            index: list[tuple[int, int]] = []

            def keep(chunk: bytes) -> None:
                spool.write(chunk)
                index.append((len(chunk), zlib.crc32(chunk)))

            if tables is not None:
                keep(tables_as_bytes(tables))
            entries = []
            for name, tensor in tensors.items():
                entry, pieces = coded(name, tensor, views.get(name), plans.get(name), name in users)
                for chunk in [pieces.head] * (entry.chunks - len(pieces.chunks)) + list(pieces.chunks):
                    keep(chunk)
                entries.append(entry)
            header = Header(tensors=entries, tables=tables is not None, metadata=dict(metadata or {}))
            assemble(file, spool, header, index)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error}") from None


def check_written(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Open what was written, and hold it against what was to be written, one tensor at a time.

    Raises:
        ArtifactError: it is not the same, bit for bit.
    """
    container = Container(path)
    container.check_hash()
    if list(container.entries) != list(tensors):
        raise ArtifactError(f"{path}: holds other tensors than were written; the disk or the memory may be damaged")
    for name, tensor in tensors.items():
        if not equal_bits(container.tensor(name), tensor):
            raise ArtifactError(f"{path}: {name} is read as something else than was written; please report it")


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """True if two tensors are the same, NaN and all."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and torch.equal(
        first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8)
    )


def write_coded(model: nn.Module, path: Path) -> None:
    """Write all tensors of a model, packed weights and all."""
    tensors = tensors_of(model)
    write(tensors, path, packing_of(model, tensors))


def holds_codes(model: nn.Module) -> bool:
    """True if a site's format counts on an entropy coder."""
    return any(packed.format.entropy_coded for _, packed, _ in packed_sites(model))


def packing_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> Packing:
    """The bits and columns of each of a model's tensors that hold codes; `tensors` are all of them, by name."""
    found: dict[str, tuple[int, int]] = {}
    for site, packed, _ in packed_sites(model):
        own = {name: tensors[f"{site.parameter}.{name}"] for name in packed.tensors}
        parts = packed.format.packing(own, packed.shape)
        found |= {f"{site.parameter}.{name}": bits for name, bits in parts.items()}
    return found


def integers_of(tensors: Mapping[str, Tensor], views: Mapping[str, BytePacking | None]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the integer coder takes, packed ones as their codes."""
    for name, tensor in tensors.items():
        view = views.get(name)
        if view is not None:
            yield name, view.codes(tensor)
        elif Integers().takes(tensor.dtype) and tensor.numel():
            yield name, tensor


def coded(name: str, tensor: Tensor, view: BytePacking | None, plan: Plan | None, shared: bool) -> tuple[Entry, Pieces]:
    """A tensor by the codec that takes the fewest bytes, the chunk index counted."""
    choices: list[tuple[str, BytePacking | None, Pieces, int]] = []
    for codec in ROWS:
        own_view = None
        if isinstance(codec, Integers):
            if plan is None or codec.trellis != (plan.num_states > 0):
                continue
            own_view = view
            pieces = pieces_of(as_matrix(tensor if view is None else view.codes(tensor)), plan, shared)
        elif codec.takes(tensor.dtype) and (tensor.numel() or codec.name == "raw"):
            pieces = codec.encode(tensor)
        else:
            continue
        choices.append((codec.name, own_view, pieces, codec.has_head))
    codec_name, view, pieces, heads = min(
        choices, key=lambda c: c[2].num_bytes + INDEX_BYTES * (len(c[2].chunks) + c[3])
    )
    num_chunks = len(pieces.chunks) + heads
    dtype = DTYPE_NAMES[tensor.dtype]
    entry = Entry(name=name, dtype=dtype, shape=list(tensor.shape), codec=codec_name, chunks=num_chunks, packed=view)
    return entry, pieces


def tables_as_bytes(tables: TableSet) -> bytes:
    """The first chunk of a file whose tensors share tables."""
    out = BitWriter()
    write_tables(tables, out)
    return bytes(out)


def assemble(file: BinaryIO, spool: BinaryIO, header: Header, index: list[tuple[int, int]]) -> None:
    """Write the header, the chunks in their places, and the hash of all."""
    text = header.model_dump_json(exclude_defaults=True).encode()
    stored = zlib.compress(text, 9)
    chunk_index = b"".join(length.to_bytes(4, "little") + crc.to_bytes(4, "little") for length, crc in index)
    codecs = [""] * header.tables + [entry.codec for entry in header.tensors for _ in range(entry.chunks)]
    first = FIXED.size + len(stored) + len(chunk_index)
    paddings, end = [], first
    for (length, _), codec in zip(index, codecs, strict=True):
        paddings.append(-end % ALIGNMENT if is_aligned(codec, length) else 0)
        end += paddings[-1] + length
    fixed = FIXED.pack(MAGIC, VERSION, end + 32, len(stored), len(text), len(index), 0)[:-4]
    crc = zlib.crc32(chunk_index, zlib.crc32(stored, zlib.crc32(fixed)))
    digest = hashlib.sha256()

    def put(data: bytes) -> None:
        file.write(data)
        digest.update(data)

    put(fixed + crc.to_bytes(4, "little") + stored + chunk_index)
    spool.seek(0)
    for (length, _), padding in zip(index, paddings, strict=True):
        put(bytes(padding))
        put(spool.read(length))
    file.write(digest.digest())


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place when the block ends well."""
    handle, working = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(working, 0o666 & ~umask)
        os.replace(working, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(working)
        raise


def size_of(model: nn.Module) -> int:
    """Bytes of the model's weights file: computed without writing it, unless it is entropy-coded."""
    if holds_codes(model):
        with scratch_folder() as folder:
            write_coded(model, folder / CODED)
            return (folder / CODED).stat().st_size
    return file_size(((n, t.dtype, tuple(t.shape)) for n, t in tensors_of(model).items()), METADATA)
