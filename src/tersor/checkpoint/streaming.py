"""A checkpoint larger than memory: a model that has only its shape, whose parts are read when work reaches them.

A part is one block of the stack, or "" for everything outside it. Outside `block_context(part)` its weights are on the
meta device; inside they are there. What was packed in the meantime goes to a scratch file in the output folder, and at
the end one weights file is put together from there and from the checkpoint, without ever being in memory.
"""

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibration.blocks import find_blocks, part_of
from tersor.checkpoint.artifact import describe
from tersor.checkpoint.container_write import holds_codes, packing_of, write
from tersor.checkpoint.converted import by_model_names
from tersor.checkpoint.guards import room_for
from tersor.checkpoint.layout import CODED, packed_sites, stored_parts, tensors_of, unpacked_tensors
from tersor.checkpoint.manifest import WEIGHTS
from tersor.checkpoint.safetensors_header import OnDisk, Scratch, SpanTensors, read_spans, write_spans
from tersor.checkpoint.side_files import copy_side_files
from tersor.checkpoint.skeleton import without_weights
from tersor.checkpoint.source import Source, few, from_hub, look_into
from tersor.core.errors import InputError, ModelError
from tersor.core.files import sha256
from tersor.core.messages import first_line
from tersor.core.pickled import is_pickle
from tersor.core.processor import computes
from tersor.core.weights_file import check_finite
from tersor.nn.packed import Stored
from tersor.nn.sites import check_has_sites

IN_FLOAT32 = "for which this processor has no instructions: computed in float32, and stored as it came"
OnBlock = Callable[[int, int], None]
M_MMAP_THRESHOLD, LARGE = -3, 2**20  # the option's number in malloc.h; bytes


def no_lines(done: int, total: int) -> None:
    """Show no progress."""


class StreamedModel:
    """A model whose weights come and go with the work on its parts.

    Attributes:
        model: is compressed part by part.
        original: the same model to be left as it is; the two share what is read.
        source: a description of the checkpoint, as `open_model` describes one.
        block_names: the parts beside "".
    """

    def __init__(self, name: str, output: Path, on_block: OnBlock = no_lines, dtype: torch.dtype | None = None):
        """Open a Hugging Face folder or hub id without reading its weights.

        Args:
            output: the artifact's folder, which exists.
            on_block: called when a block has been written, with its number and how many there are.
            dtype: type the model computes in; None: the type it was saved in.

        Raises:
            ModelError: the checkpoint lacks a tensor, or holds it in another shape, or cannot be read.
            InputError: the model cannot be taken apart into blocks.
        """
        return_memory_at_once()
        self.output, self.scratch, self.on_block = output, Scratch(output / "scratch"), on_block
        folder = folder_of(name)
        config, model_class, files = look_into(name, folder)
        if files[0].name == CODED:
            raise InputError(f"{name}: packed; --stream reads plain safetensors: `tersor unpack {name} -o plain`")
        if is_pickle(files[0]):
            line = f"import transformers as t; t.{model_class.__name__}.from_pretrained('.').save_pretrained('.')"
            raise InputError(
                f"{name}: --stream reads safetensors, of which it takes a part at a time, and this is {files[0].name}; "
                f'write them: cd {folder}; python -c "{line}"; or leave out --stream'
            )
        stored = {tensor: span for file in files for tensor, span in read_spans(file).items()}
        types = [span.dtype for span in stored.values() if span.dtype.is_floating_point]
        self.stored_in = dtype or config.dtype or next(iter(types), torch.float32)
        is_slow = dtype is None and not computes(self.stored_in)
        dtype = torch.float32 if is_slow else self.stored_in
        try:
            self.model = without_weights(model_class, config, dtype, room_for([e.shape for e in stored.values()]))
            self.model.requires_grad_(False)
        except Exception as error:  # a config whose numbers do not go together can trip over anything
            raise ModelError(f"{name}: transformers cannot build {model_class.__name__}: {first_line(error)}") from None
        check_has_sites(self.model)
        self.block_names = find_blocks(self.model)
        if not self.block_names:
            raise InputError(f"{name}: {model_class.__name__} is no stack of blocks; compress it without --stream")
        if self.model._get_dtype_plan(self.stored_in):
            raise InputError(
                f"{name}: keeps some weights in float32 beside {self.stored_in}; compress it without --stream"
            )
        self.spans, unused = matched(self.model, by_model_names(self.model, stored), name)
        fill_buffers(self.model, self.spans)
        self.original = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        self.names = {id(tensor): key for key, tensor in unpacked_tensors(self.model, detach=False).items()}
        self.meta: dict[int, nn.Parameter] = {}  # what stood in the place of the weights that are there
        notes = [f"{model_class.__name__} does not use {few(sorted(unused))}: left out"] if unused else []
        notes += [f"the model is in {str(self.stored_in).removeprefix('torch.')}, {IN_FLOAT32}"] if is_slow else []
        self.source = Source(
            model=self.model,
            name=name,
            kind="transformers",
            architecture=type(self.model).__name__,
            folder=folder,
            num_bytes=sum(file.stat().st_size for file in files),
            hashes={file.name: sha256(file) for file in files},
            notes=tuple(notes),
        )

    @contextmanager
    def block_context(self, part: str) -> Iterator[None]:
        """The weights of a part are there inside, and gone afterwards; what was packed inside is written."""
        self.load(part)
        yield
        before = self.scratch.num_bytes
        self.unload(part)
        gc.collect()  # what hooks and frames hold in circles would stay until Python feels like looking
        if part and self.scratch.num_bytes > before:
            self.on_block(self.block_names.index(part) + 1, len(self.block_names))

    def load(self, part: str) -> None:
        loaded: dict[int, nn.Parameter] = {}
        for module in self.modules(part):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in loaded:
                        weight = nn.Parameter(self.read(parameter), requires_grad=False)
                        loaded[id(parameter)], self.meta[id(weight)] = weight, parameter
                    module._parameters[name] = loaded[id(parameter)]
        for prefix, stored in self.packed(part):
            for name, tensor in stored.tensors.items():
                if tensor.is_meta:
                    stored._buffers[name] = self.spans[f"{prefix}.{name}"].read()

    def unload(self, part: str) -> None:
        for prefix, stored in self.packed(part):
            for name, tensor in stored.tensors.items():
                if f"{prefix}.{name}" not in self.spans:
                    self.spans[f"{prefix}.{name}"] = self.scratch.append(tensor)
            stored.to("meta")
        unloaded: dict[int, nn.Parameter] = {}
        for module in self.modules(part):
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    unloaded[id(parameter)] = parameter
                    module._parameters[name] = self.meta[id(parameter)]
        for weight in unloaded:
            del self.meta[weight]

    def modules(self, part: str) -> Iterator[nn.Module]:
        """The modules of a part, in both models."""
        for model in (self.model, self.original):
            for path, module in model.named_modules():
                if not isinstance(module, Stored) and part_of(self.block_names, path) == part:
                    yield module

    def packed(self, part: str) -> Iterator[tuple[str, Stored]]:
        """Yields the packed weights of a part, with the prefix of their tensors' names."""
        for prefix, stored in stored_parts(self.model):
            if part_of(self.block_names, prefix) == part:
                yield prefix, stored

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The weight that a parameter stands for, in the model's precision."""
        name = self.names[id(parameter)]
        tensor = self.spans[name].read()
        check_finite({name: tensor}, str(self.spans[name].path))
        return tensor.to(self.stored_in).to(parameter.dtype)

    def save(self, manifest: Mapping[str, Any]) -> None:
        """Write the artifact, as `artifact.save` would write the whole model."""
        assert self.source.folder is not None
        copy_side_files(self.source.folder, self.output)
        content: dict[str, OnDisk] = {}
        for _, packed, _ in packed_sites(self.model):
            packed.dtype = self.stored_in
        unpacked = unpacked_tensors(self.model)
        for name, tensor in tensors_of(self.model).items():
            content[name] = self.spans.get(name) or self.scratch.append(tensor)
            dtype = self.stored_in if name in unpacked and tensor.is_floating_point() else tensor.dtype
            if content[name].dtype != dtype:
                content[name] = self.scratch.append(content[name].read().to(dtype))
        if holds_codes(self.model):
            tensors = SpanTensors(content)
            write(tensors, self.output / CODED, packing_of(self.model, tensors))
        else:
            write_spans(content, self.output / WEIGHTS)
        self.scratch.path.unlink(missing_ok=True)
        describe(self.model, self.output, manifest)


def folder_of(name: str) -> Path:
    """The folder of what the user named, downloaded if need be. Raises InputError for what is none."""
    folder = Path(name).expanduser()
    if folder.is_file() or (":" in name and not folder.exists()):
        raise InputError(f"{name}: --stream reads a Hugging Face folder; compress it without --stream")
    if (folder / "tersor.json").exists():
        raise InputError(f"{name} is a tersor artifact already; compress the original model instead")
    return folder if folder.exists() else from_hub(name)


def return_memory_at_once() -> None:
    """Have the C library give every large tensor back to the system when it is freed. glibc otherwise raises, with
    every one it sees, the size up to which it keeps them, and cannot return them for what small ones lie between."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries do without
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def matched(model: Any, stored: Mapping[str, OnDisk], place: str) -> tuple[dict[str, OnDisk], set[str]]:
    """The place of each of the model's tensors in the checkpoint, and the names in it that the model does not use.

    A tied tensor may be stored under any of its names, and all with or without the prefix of the bare model.
    """
    prefix = f"{model.base_model_prefix}."
    paths: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        paths.setdefault(id(tensor), []).extend([name, name.removeprefix(prefix), prefix + name])
    found, used, missing = {}, set(), []
    for name, tensor in unpacked_tensors(model, detach=False).items():
        used.update(paths[id(tensor)])
        keys = [path for path in dict.fromkeys(paths[id(tensor)]) if path in stored]
        check_tied(keys, stored, place)
        key = next(iter(keys), None)
        if key is None:
            missing += [name] if isinstance(tensor, nn.Parameter) else []
        elif stored[key].shape != tuple(tensor.shape):
            raise ModelError(f"{place}: {key} is {stored[key].shape}, but the model has {tuple(tensor.shape)} here")
        else:
            found[name] = stored[key]
    if missing:
        raise ModelError(
            f"{place}: the checkpoint lacks {few(missing)} of {type(model).__name__}; download or save it again, or "
            f"leave out --stream, which starts them at random"
        )
    return found, stored.keys() - used


def check_tied(keys: list[str], stored: Mapping[str, OnDisk], place: str) -> None:
    """Raises ModelError where the config ties tensors that the checkpoint holds apart."""
    for other in keys[1:]:
        pair = stored[keys[0]], stored[other]
        if pair[0].shape != pair[1].shape or not torch.equal(pair[0].read(), pair[1].read()):
            raise ModelError(
                f"{place}: config.json ties {other} to {keys[0]}, and the checkpoint holds other weights; write "
                f'"tie_word_embeddings": false into config.json, or leave out --stream'
            )


def fill_buffers(model: nn.Module, spans: Mapping[str, OnDisk]) -> None:
    """Read the buffers that the checkpoint holds; they stay in memory."""
    for name, buffer in unpacked_tensors(model, detach=False).items():
        if not isinstance(buffer, nn.Parameter) and name in spans:
            buffer.copy_(spans[name].read())
