"""`tersor pack` and `tersor unpack`: checkpoints to `model.tersor` and back, bit for bit."""

import json
import shutil
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.checkpoint.container import MAGIC, Container
from tersor.checkpoint.container_write import check_written, equal_bits, write
from tersor.checkpoint.guards import check_links, named_path
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.manifest import (
    MANIFEST,
    WEIGHTS,
    check_files,
    read_manifest,
    weights_path,
    write_manifest,
)
from tersor.checkpoint.notice import withdraw
from tersor.checkpoint.output import atomic_file, atomic_folder, check_output
from tersor.checkpoint.restore import read_tensors
from tersor.checkpoint.seal import RECORDS, first_foreign, listing
from tersor.checkpoint.source import is_inside, weight_files
from tersor.checkpoint.views import Packing
from tersor.core.errors import ArtifactError, FormatError, InputError, ModelError
from tersor.core.weights_file import DTYPE_NAMES, opened, write_weights
from tersor.formats import format_named
from tersor.formats.contract import Encoded
from tersor.nn.packed import Fold

FILES = "files"  # in the container's metadata: the name of each file that was packed, and the tensors it held
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class PackedFolder:
    """The folder that was written, and the bytes of the weights before and after."""

    output: Path
    before: int
    after: int


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path]):
        self.places: dict[str, Path] = {}
        for file in files:
            with opened(file) as content:
                for name in content.keys():  # noqa: SIM118
                    if name in self.places:
                        raise ModelError(f"{file}: the tensor {name} is in {self.places[name].name} as well")
                    self.places[name] = file

    def __getitem__(self, name: str) -> Tensor:
        with opened(self.places[name]) as content:
            tensor = content.get_tensor(name)
        if tensor.dtype not in DTYPE_NAMES:
            raise ModelError(f"{self.places[name]}: {name} is {tensor.dtype}, which tersor does not store")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def pack(source: Path, output: Path, *, overwrite: bool = False) -> PackedFolder:
    """Write the tensors of a checkpoint folder, a safetensors file or an artifact as `model.tersor` into a new folder,
    beside the other files as they came. `unpack` gives the same tensors back, bit for bit. A safetensors file alone can
    become one file: an output that ends in .tersor.

    Raises:
        InputError, ModelError: the source is no checkpoint, is packed already, or the output is in the way.
    """
    as_file = names_file(source, output, Path(CODED).suffix)
    check_output(output, overwrite, not_packed if as_file else first_foreign)
    if named_path(source).is_dir():
        check_links(source)
    manifest: dict[str, Any] | None = None
    if (source / MANIFEST).exists():
        manifest = read_manifest(source)
        check_files(source, manifest)
        files = [weights_path(source, manifest)]
    else:
        files = weight_files(source) if source.is_dir() else [source]
    if (source / CODED).exists() or source.suffix == Path(CODED).suffix:
        raise InputError(f"{source}: packed already; `tersor unpack` gives it back")
    if not files:
        raise ModelError(f"{source}: no *.safetensors file in the folder")
    tensors = LazyTensors(files)
    shards = {file.relative_to(source).as_posix(): names_in(tensors, file) for file in files} if len(files) > 1 else {}
    metadata = {FILES: json.dumps(shards)} if shards else {}
    before = sum(file.stat().st_size for file in files)
    if as_file:
        with atomic_file(output, overwrite, not_packed) as working:
            write(tensors, working, packing_of(manifest, tensors), metadata)
            check_written(tensors, working)
        return PackedFolder(output, before, output.stat().st_size)
    with atomic_folder(output, overwrite) as folder:
        write(tensors, folder / CODED, packing_of(manifest, tensors), metadata)
        check_written(tensors, folder / CODED)
        if source.is_dir():
            copy_others(source, folder, {file.relative_to(source).as_posix() for file in files} | {INDEX}, output)
        if manifest is not None:
            write_manifest(folder, manifest | {"files": listing(folder)})
    return PackedFolder(output, before, (output / CODED).stat().st_size)


def unpack(source: Path, output: Path, *, overwrite: bool = False) -> PackedFolder:
    """Write what is in a `model.tersor`, or in its folder, as plain safetensors into a new folder, in as many files as
    were packed. The sites of an artifact, of either kind, are decoded to weights, under the names and in the types they
    had before, so that transformers loads the folder. A file alone can become one file: an output that ends in
    .safetensors.

    Raises:
        InputError: the source is not packed, or the output is in the way.
        ArtifactError: the source is damaged.
    """
    as_file = names_file(source, output, Path(WEIGHTS).suffix)
    if not as_file:
        check_output(output, overwrite)
    if named_path(source).is_dir():
        check_links(source)
    manifest = read_manifest(source) if (source / MANIFEST).exists() else None
    if manifest is not None:
        check_files(source, manifest)
        file = weights_path(source, manifest)
    else:
        file = source / CODED if source.is_dir() else source
    if not file.is_file():
        raise InputError(f"{source}: has no {CODED}; `tersor pack` makes one")
    container = None if file.name == WEIGHTS else Container(file)
    tensors = read_tensors(file) if container is None else container.tensors()
    if manifest is not None:
        tensors = decoded(tensors, manifest)
    if as_file:
        foreign = partial(other_than, tensors=tensors, source=source)
        check_output(output, overwrite, foreign)
        with atomic_file(output, overwrite, foreign) as working:
            write_weights(tensors, working, alignment=1)
        return PackedFolder(output, file.stat().st_size, output.stat().st_size)
    with atomic_folder(output, overwrite) as folder:
        shards = {WEIGHTS: list(tensors)} if container is None else shards_of(container, tensors, file)
        for name, names in shards.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_weights({each: tensors[each] for each in names}, folder / name, alignment=1)
        if len(shards) > 1 or WEIGHTS not in shards:
            index = {each: name for name, names in shards.items() for each in names}
            size = sum(tensor.nbytes for tensor in tensors.values())
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2, sort_keys=True)
            (folder / INDEX).write_text(text + "\n", encoding="utf-8")
        if source.is_dir():
            own = {file.name, *(("README.md", "recipe.yaml") if manifest is not None else ())}
            copy_others(source, folder, own, output)
            withdraw(folder)
        after = sum((folder / name).stat().st_size for name in shards)
    return PackedFolder(output, file.stat().st_size, after)


def names_file(source: Path, output: Path, suffix: str) -> bool:
    """True if the output is a single file, by its name. Raises InputError where it cannot be one."""
    if output.suffix != suffix:
        return False
    if source.is_dir():
        raise InputError(
            f"{output}: {source} is a folder, so the output is one, too; write -o {output.with_suffix('')}"
        )
    return True


def not_packed(path: Path) -> str | None:
    """A sentence if a file does not begin like one that `tersor pack` wrote; else None."""
    with path.open("rb") as file:
        return None if file.read(len(MAGIC)) == MAGIC else "tersor did not write it"


def other_than(path: Path, tensors: Mapping[str, Tensor], source: Path) -> str | None:
    """A sentence if a safetensors file does not hold exactly these tensors; else None.

    Nothing in such a file says who wrote it, so one with the same content may be replaced.
    """
    try:
        with opened(path) as file:
            same = set(file.keys()) == set(tensors) and all(
                equal_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items()
            )
    except ModelError:
        same = False
    return None if same else f"it is not what {source} holds"


def names_in(tensors: LazyTensors, file: Path) -> list[str]:
    """The names of the tensors in one file."""
    return [name for name, place in tensors.places.items() if place == file]


def shards_of(container: Container, tensors: Mapping[str, Tensor], path: Path) -> dict[str, list[str]]:
    """The files to write, with the names of their tensors. Raises ArtifactError for a list that does not fit."""
    text = container.header.metadata.get(FILES)
    if text is None:
        return {WEIGHTS: list(tensors)}
    try:
        shards = json.loads(text)
        plain = all(is_inside(name) for name in shards)
        whole = sorted(each for names in shards.values() for each in names) == sorted(tensors)
    except (ValueError, AttributeError, TypeError):
        plain = whole = False
    if not (plain and whole):
        raise ArtifactError(f"{path}: the files it says it was packed from do not hold its tensors")
    return shards


def packing_of(manifest: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Packing:
    """The bits and columns of each of an artifact's tensors that hold codes."""
    found: dict[str, tuple[int, int]] = {}
    for parameter, entry in sites_of(manifest, tensors).items():
        format = format_named(entry["format"])
        parts = {part: tensors[f"{parameter}.{part}"] for part in format.layout(tuple(entry["shape"]))}
        packing = format.packing(parts, tuple(entry["shape"]))
        found |= {f"{parameter}.{part}": bits for part, bits in packing.items()}
    return found


def sites_of(manifest: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The manifest's sites by the name of their parameter. Raises ArtifactError where the file does not hold one."""
    found = {}
    for name, entry in (manifest or {"sites": {}})["sites"].items():
        parts = list(format_named(entry["format"]).layout(tuple(entry["shape"])))
        parameter = next((p for p in (f"{name}.weight", name) if all(f"{p}.{part}" in tensors for part in parts)), None)
        if parameter is None:
            raise ArtifactError(f"{name}: the file does not hold its parts {', '.join(parts)}")
        found[parameter] = entry
    return found


def decoded(tensors: dict[str, Tensor], manifest: dict[str, Any]) -> dict[str, Tensor]:
    """An artifact's tensors with every site as an ordinary weight; what quantizes inputs is left out."""
    rest = dict(tensors)
    for parameter, entry in sites_of(manifest, tensors).items():
        format, shape = format_named(entry["format"]), (entry["shape"][0], entry["shape"][1])
        parts = {}
        for part, (dtype, sides) in format.layout(shape).items():
            tensor = rest.pop(f"{parameter}.{part}")
            fits = tensor.dim() == len(sides) and all(s in (None, n) for s, n in zip(sides, tensor.shape, strict=True))
            if tensor.dtype != dtype or not fits:
                raise ArtifactError(
                    f"{format.name} at {parameter}: part {part} should be {dtype} {sides}, and the file has "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
            parts[part] = tensor
        fold = Fold(tuple(entry["weight_shape"]), entry["view"])
        if fold.shape != shape:
            raise ArtifactError(f"{parameter}: a matrix {shape} does not fold into {fold.weight_shape}")
        try:
            weight = Encoded(format, shape, parts).decode(getattr(torch, entry["dtype"]))
        except FormatError as error:
            raise ArtifactError(f"{parameter}: {error}") from None
        rest[parameter] = fold.unfold(weight).contiguous()
        for name in [name for name in rest if name.startswith(f"{parameter}.input.")]:
            del rest[name]
    return rest


def copy_others(source: Path, folder: Path, but: Set[str], output: Path) -> None:
    """Every file of a folder as it came, whatever it is; not those named in `but`, the list of what tersor wrote there,
    hidden folders, and the output where that lies inside."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts[:-1])
        skipped = relative.as_posix() in but or relative.as_posix() in RECORDS or hidden
        if path.is_file() and not skipped and not path.absolute().is_relative_to(output.absolute()):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
