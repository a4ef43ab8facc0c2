"""`model.tersor`: tensors come back bit for bit, from any version's file, whole or in parts; damage is always told."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rans_numpy
from golden.container.write_container import (
    GOLDEN,
    GOLDEN_PLANES,
    GOLDEN_TRELLIS,
    PACKING,
    bell,
    on_paths,
    plane_tensors,
    tensors,
    trellis_tensors,
)
from tersor.checkpoint.container import FIXED, TRAILER, Container, read
from tersor.checkpoint.container_write import write
from tersor.codecs import rans
from tersor.core.errors import ArtifactError

FUZZ = settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A file with every codec, a view, shared tables and an aligned chunk."""
    path = tmp_path_factory.mktemp("small") / "model.tersor"
    chosen = {name: each for name, each in tensors().items() if name not in ("chunks", "wide", "bf16", "fp16")}
    path_of_8 = on_paths(bell(96, 64, 2), 8)
    once_half = plane_tensors()["fp32 of fp16"]
    write(chosen | {"large": torch.arange(700), "path": path_of_8, "once half": once_half}, path, PACKING)
    assert Container(path).header.tables
    return path


# What comes back.


def test_golden_files_are_read_forever():
    check_same(read(GOLDEN), tensors())
    assert Container(GOLDEN).header.metadata == {"made": "golden"}
    assert {entry.codec for entry in Container(GOLDEN).header.tensors} == {"raw", "integers", "floats"}
    check_same(read(GOLDEN_TRELLIS), trellis_tensors())
    plain = {"no path", "broken path"}
    codecs = {entry.name: entry.codec for entry in Container(GOLDEN_TRELLIS).header.tensors}
    assert codecs == {name: "integers" if name in plain else "trellis" for name in codecs}
    assert Container(GOLDEN_TRELLIS).header.tables
    check_same(read(GOLDEN_PLANES), plane_tensors())
    assert {entry.codec for entry in Container(GOLDEN_PLANES).header.tensors} == {"floats"}


def test_round_trip(tmp_path):
    path = tmp_path / "model.tersor"
    write(tensors(), path, PACKING)
    check_same(read(path), tensors())
    check_same(read(path, num_threads=1), tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["model.tersor"]


def test_the_loops_in_numpy_write_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rans, "loops", lambda: rans_numpy)
    chosen = {name: each for name, each in (tensors() | trellis_tensors()).items() if each.numel() < 3000}
    write(chosen, tmp_path / "numpy", PACKING)
    monkeypatch.undo()
    write(chosen, tmp_path / "numba", PACKING)
    assert (tmp_path / "numpy").read_bytes() == (tmp_path / "numba").read_bytes()


def test_same_tensors_same_bytes(small, tmp_path):
    write(read(small), tmp_path / "again", PACKING)
    assert (tmp_path / "again").read_bytes() == small.read_bytes()


def test_packed_codes_are_coded_as_codes(tmp_path):
    """Four-bit codes at the cost of their entropy, though each byte holds two."""
    packed = tensors()["packed4"].repeat(40, 1)
    write({"a": packed}, tmp_path / "codes", {"a": (4, 33)})
    write({"a": packed}, tmp_path / "bytes")
    assert (tmp_path / "codes").stat().st_size < 0.95 * (tmp_path / "bytes").stat().st_size
    check_same(read(tmp_path / "codes"), {"a": packed})


def test_bytes_that_packing_would_not_give_stay_as_they_are(tmp_path):
    """The unused bits at the end of a row are not zero: no view, and the very same bytes."""
    packed = tensors()["packed3"] | 128
    write({"a": packed}, tmp_path / "odd", {"a": (3, 50)})
    assert Container(tmp_path / "odd").entries["a"].packed is None
    check_same(read(tmp_path / "odd"), {"a": packed})


def test_damage_is_said_by_its_chunk(tmp_path):
    """And by the bytes of the file that hold it."""
    matrix = bell(2000, 600, 2).to(torch.int8)
    write({"a": matrix}, tmp_path / "a")
    container = Container(tmp_path / "a")
    assert len(container.chunks["a"]) > 4
    damaged = bytearray((tmp_path / "a").read_bytes())
    damaged[container.chunks["a"][3].first + 100] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    container = Container(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"a, chunk 3 of 5 \(bytes \d+ to \d+\): the checksum differs"):
        container.tensor("a")


def test_large_plain_chunks_are_aligned(small):
    chunk = Container(small).chunks["large"][0]
    assert chunk.first % 64 == 0
    assert small.read_bytes()[chunk.first : chunk.end] == bits(torch.arange(700))


def test_shared_tables_pay(tmp_path):
    """Many small matrices of the same kind take less in one file than apart."""
    parts = {f"{n}": torch.round(2 * torch.randn(40 + n, 60)).to(torch.int16) for n in range(12)}
    write(parts, tmp_path / "together")
    assert Container(tmp_path / "together").header.tables
    apart = 0
    for name, part in parts.items():
        write({name: part}, tmp_path / "apart")
        apart += Container(tmp_path / "apart").stored_bytes(name)
    together = Container(tmp_path / "together")
    assert sum(together.stored_bytes(name) for name in parts) < 0.99 * apart


def test_nothing_half_written(tmp_path):
    """An error in the middle leaves the old file, and no other."""
    path = tmp_path / "model.tersor"
    path.write_bytes(b"old")

    class Broken(dict):  # type: ignore[type-arg]
        def items(self):
            yield "a", torch.zeros(5)
            raise KeyError("b")

    with pytest.raises(KeyError):
        write(Broken(a=torch.zeros(5)), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.tersor"]
    assert path.read_bytes() == b"old"
    with pytest.raises(ArtifactError, match="cannot be written"):
        write({"a": torch.zeros(5)}, tmp_path / "no folder" / "model.tersor")


# Damage.


def test_every_flipped_byte_is_noticed(small, tmp_path):
    """One byte after another, all of them that are not inside a chunk, and some of each chunk."""
    whole, container = small.read_bytes(), Container(small)
    places = set(range(container.chunks[next(iter(container.entries))][0].first))
    for chunks in container.chunks.values():
        for chunk in chunks:
            places |= {chunk.first - 1, chunk.first, (chunk.first + chunk.end) // 2, chunk.end - 1, chunk.end}
    places |= set(range(len(whole) - TRAILER, len(whole)))
    path = tmp_path / "damaged"
    for place in sorted(places)[::2]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            read(path, num_threads=1)


@pytest.mark.parametrize("keep", [0, 1, 7, 31, 32, 63, 64, 200, 1000, -33, -32, -1])
def test_truncated(small, tmp_path, keep):
    (tmp_path / "cut").write_bytes(small.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="cut"):
        Container(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(small.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="were written"):
        Container(tmp_path / "cut")


def test_the_hash_of_the_whole_file_is_checked(small, tmp_path):
    """A byte between chunks, or of the hash itself, is in no chunk's checksum."""
    content = bytearray(small.read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.tersor").write_bytes(content)
    container = Container(tmp_path / "other.tersor")
    for check in (container.check, container.check_hash, lambda: read(tmp_path / "other.tersor")):
        with pytest.raises(ArtifactError, match="the SHA-256 at its end differs"):
            check()
    container.tensors()


def test_the_message_names_the_tensor(small, tmp_path):
    chunk = Container(small).chunks["int16"][1]
    damaged = bytearray(small.read_bytes())
    damaged[chunk.first] ^= 4
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"damaged: int16, chunk 1 of 1 \(bytes .*copy it again"):
        read(tmp_path / "damaged")
    with pytest.raises(ArtifactError, match="has no tensor nothing"):
        Container(small).tensor("nothing")
    (tmp_path / "other").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ArtifactError, match=r"not a model\.tersor file"):
        read(tmp_path / "other")


def forge(whole: bytes, change=None, chunk=None) -> bytes:
    """The file with another header or other chunks, and every checksum made to agree, as a forger would."""
    fields = list(FIXED.unpack(whole[: FIXED.size]))
    stored, num_chunks = fields[3], fields[5]
    header = json.loads(zlib.decompress(whole[FIXED.size : FIXED.size + stored]))
    place = FIXED.size + stored
    index = [list(pair) for pair in struct.iter_unpack("<II", whole[place : place + 8 * num_chunks])]
    body = bytearray(whole[place + 8 * num_chunks : -TRAILER])
    if change is not None:
        header = change(header)
    if chunk is not None:
        chunk(body)
        at = 0
        for pair in index:
            pair[1], at = zlib.crc32(body[at : at + pair[0]]), at + pair[0]
    text = json.dumps(header).encode()
    stored_text = zlib.compress(text)
    packed_index = b"".join(struct.pack("<II", *pair) for pair in index)
    end = FIXED.size + len(stored_text) + len(packed_index) + len(body) + TRAILER
    fixed = FIXED.pack(fields[0], fields[1], end, len(stored_text), len(text), len(index), 0)[:-4]
    crc = zlib.crc32(packed_index, zlib.crc32(stored_text, zlib.crc32(fixed)))
    content = fixed + crc.to_bytes(4, "little") + stored_text + packed_index + body
    return content + hashlib.sha256(content).digest()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    """A file without padding, for forgers."""
    path = tmp_path_factory.mktemp("plain") / "model.tersor"
    kinds = ("int8", "escapes", "uint8", "packed3", "fp32 of bf16", "fp8 e4m3", "int64")
    chosen = {name: tensors()[name] for name in kinds}
    write(chosen | {name: trellis_tensors()[name] for name in ("trellis8", "sparse", "narrow")}, path, PACKING)
    return path.read_bytes()


def test_the_forger_forges(plain, tmp_path):
    (tmp_path / "same").write_bytes(forge(plain))
    assert torch.equal(read(tmp_path / "same")["int8"], tensors()["int8"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "escapes", "two tensors are called escapes"),
        ("dtype", "F99", "which this tersor has not"),
        ("dtype", "F32", "by the codec integers"),
        ("codec", "pickle", "which this tersor has not"),
        ("codec", "raw", "bytes for"),
        ("codec", "floats", "by the codec floats"),
        ("chunks", 0, "in 0 chunks"),
        ("chunks", 3, "do not have"),
        ("chunks", -1, "header is not one"),
        ("chunks", 2**40, "header is not one"),
        ("shape", [-1, 4], "the shape"),
        ("shape", [2**40, 2**40], "the shape"),
        ("shape", [2**20, 2**21], "cannot hold"),
        ("shape", [0, 2**40], "cannot hold"),
        ("shape", [1] * 9, "header is not one"),
        ("shape", [64, 95], "chunk 1 of 1|classes"),
        ("shape", [65, 96], "chunk 1 of 1|classes"),
        ("shape", "64", "header is not one"),
        ("packed", {"bits": 3, "columns": 50, "zero": 4}, "packed codes of I8"),
        ("extra", 1, "header is not one"),
    ],
)
def test_hostile_headers(plain, tmp_path, key, value, message):
    def change(header):
        header["tensors"][0][key] = value
        return header

    (tmp_path / "forged").write_bytes(forge(plain, change))
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path / "forged")


@pytest.mark.parametrize("header", [[], 1, "x", {}, {"tensors": 5}, {"tensors": [], "tables": 3}, {"tensors": [{}]}])
def test_headers_of_another_form(plain, tmp_path, header):
    (tmp_path / "forged").write_bytes(forge(plain, lambda _: header))
    with pytest.raises(ArtifactError):
        read(tmp_path / "forged")


@pytest.mark.parametrize("view", [{"bits": 3, "columns": 2**39, "zero": 0}, {"bits": 0, "columns": 1, "zero": 0}])
def test_hostile_views(plain, tmp_path, view):
    def change(header):
        next(entry for entry in header["tensors"] if entry["name"] == "packed3")["packed"] = view
        return header

    (tmp_path / "forged").write_bytes(forge(plain, change))
    with pytest.raises(ArtifactError):
        read(tmp_path / "forged")


def test_a_header_that_inflates_without_end(plain, tmp_path):
    bomb = zlib.compress(bytes(10**8), 9)
    fields = list(FIXED.unpack(plain[: FIXED.size]))
    fixed = FIXED.pack(fields[0], fields[1], FIXED.size + len(bomb) + TRAILER, len(bomb), 100, 0, 0)[:-4]
    content = fixed + zlib.crc32(bomb, zlib.crc32(fixed)).to_bytes(4, "little") + bomb
    (tmp_path / "bomb").write_bytes(content + bytes(32))
    with pytest.raises(ArtifactError, match="does not inflate to 100 bytes"):
        read(tmp_path / "bomb")


def only_our_errors(content: bytes, path: Path) -> bool:
    """Whether a forged file is read; if not, by an ArtifactError."""
    path.write_bytes(content)
    try:
        found = read(path, num_threads=1)
    except ArtifactError as error:
        assert str(error)  # noqa: PT017
        return False
    assert sum(tensor.nbytes for tensor in found.values()) <= 4 * 1024 * len(content)
    return True


@given(data=st.data())
@FUZZ
def test_forged_chunks(plain, tmp_path, data):
    """Bytes changed inside the chunks, with checksums that agree: read as something else, or refused."""

    def chunk(body):
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))

    only_our_errors(forge(plain, chunk=chunk), tmp_path / "forged")


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files(plain, tmp_path):
    """Flipped, cut, spliced and overwritten bytes: half of them with checksums made to agree."""
    random = np.random.default_rng(0)
    refused = 0
    for number in range(100_000):
        content = bytearray(plain)

        def mutate(part: bytearray) -> None:
            for _ in range(random.integers(1, 5)):
                at = int(random.integers(len(part)))
                kind = random.integers(4)
                if kind == 0:
                    part[at] ^= 1 << int(random.integers(8))
                elif kind == 1:
                    part[at] = int(random.choice([0, 1, 127, 128, 255]))
                elif kind == 2:
                    part[at : at + 4] = random.bytes(len(part[at : at + 4]))
                else:
                    other = int(random.integers(len(part)))
                    size = min(int(random.integers(1, 64)), len(part) - max(at, other))
                    part[at : at + size] = part[other : other + size]

        if number % 2:
            mutate(content)
            if number % 10 == 1:
                content = content[: int(random.integers(len(content)))]
            refused += not only_our_errors(bytes(content), tmp_path / "mutated")
            continue
        only_our_errors(forge(plain, chunk=mutate), tmp_path / "mutated")
    assert refused > 49_000  # some mutations change nothing
