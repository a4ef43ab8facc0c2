"""Opens the model that the user named: a Hugging Face model, a tersor artifact, or a model of their own."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tersor.checkpoint.artifact import load, read_manifest, weights_path
from tersor.checkpoint.guards import named_path
from tersor.checkpoint.layout import packed_sites
from tersor.checkpoint.source import (
    WRAPPED,
    Source,
    call_factory,
    from_hub,
    open_transformers,
    read_state,
    state_hash,
    unwrapped,
)
from tersor.core.errors import InputError, ModelError, UnknownName
from tersor.core.files import sha256
from tersor.core.memory import available_memory
from tersor.core.pickled import without_prefix
from tersor.core.processor import computes
from tersor.core.weights_file import check_finite, finite_range
from tersor.nn.copies import copy_but_sites, own_shared_weights
from tersor.nn.dtypes import types_of


@dataclass(frozen=True)
class ModelSpec:
    """The name of a model, and the way it is opened.

    Attributes:
        model: Hugging Face folder or hub id, artifact folder, `package.module:factory`, or a module in memory.
        weights: state dict or artifact folder that fills what a factory makes.
        dtype: type the model computes in; None: the type it was saved in.
        lazy: leave the entropy-coded sites of an artifact in their file until they run.
    """

    model: str | Path | nn.Module
    weights: Path | None = None
    dtype: torch.dtype | None = None
    lazy: bool = False

    @property
    def name(self) -> str:
        """The name of the model as the user gave it; of a module in memory, that of its class."""
        return type(self.model).__name__ if isinstance(self.model, nn.Module) else str(self.model)

    def open(self) -> Source:
        """The model in memory; a module that was given is left as it is. Raises as `open_model` does."""
        if not isinstance(self.model, nn.Module):
            return open_model(self.name, weights=self.weights, lazy=self.lazy, dtype=self.dtype)
        if self.weights is not None or self.lazy:
            raise InputError(f"{self.name} is in memory, and weights and lazy are for models in files; leave them out")
        source = open_module(self.model)
        return source if self.dtype is None else cast(source, self.dtype)

    def open_to_run(self) -> Source:
        """Open the model for work that runs it often: in float32 if the processor is slow in the model's own type.

        A `dtype` that was asked for is kept. Raises as `open`.
        """
        source = self.open()
        return source if self.dtype is not None else in_fast_type(source)


def in_fast_type(source: Source) -> Source:
    """A model in float16 or bfloat16 on a processor without instructions for it, to be computed in float32, if there is
    memory for two of it; what it was is kept in `dtypes`, and said in a note."""
    kinds = types_of(source.model)
    slow = {kind for kind in kinds.values() if not computes(kind)}
    if not slow:
        return source
    names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in slow))
    num_bytes = sum(4 * parameter.numel() for parameter in source.model.parameters())
    free = available_memory()
    if free is not None and 2 * num_bytes > free:
        note = (
            f"the model is in {names}, which this processor computes slowly, and there is no memory for it in "
            f"float32: two models of {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
        return replace(source, notes=(*source.notes, note))
    source.model.float()
    note = (
        f"the model is in {names}, for which this processor has no instructions: computed in float32, which takes "
        f"{num_bytes / 1e6:.0f} MB of memory, and stored as it came; --dtype {names.split(' ')[0]} computes in that"
    )
    return replace(source, notes=(*source.notes, note), dtypes=kinds)


def open_module(model: nn.Module) -> Source:
    """A module in memory as a source of its own: a copy, which shares no tensor with it.

    A Hugging Face model that was read from a folder takes its tokenizer and other files from there.
    """
    made = copy_but_sites(model)
    own_shared_weights(made, model)
    folder = Path(getattr(model, "name_or_path", "") or "/dev/null/")
    is_transformers = hasattr(model, "save_pretrained") and hasattr(model, "config")
    kind = "artifact" if packed_sites(made) else "transformers" if is_transformers else "custom"
    name = type(model).__name__
    has_files = is_transformers and (folder / "config.json").is_file()
    return Source(made.eval(), name, kind, name, folder if has_files else None, hashes={"state": state_hash(made)})


def open_model(
    name: str, *, weights: Path | None = None, lazy: bool = False, dtype: torch.dtype | None = None
) -> Source:
    """Open what the user named. Raises ModelError or InputError, each with the way out.

    Args:
        lazy: leave the entropy-coded sites of an artifact in their file until they run.
        dtype: type the model computes in; None: the type it was saved in.
    """
    source = open_as_saved(name, weights, lazy)
    return source if dtype is None else cast(source, dtype)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type that `--dtype` names; None where it names none. Raises UnknownName for another one."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UnknownName("--dtype", dtype, DTYPES)
        return DTYPES[dtype]
    if dtype not in (None, *DTYPES.values()):
        raise UnknownName("--dtype", str(dtype).removeprefix("torch."), DTYPES)
    return dtype


def cast(source: Source, dtype: torch.dtype) -> Source:
    """A model that computes in `dtype`. Raises ModelError where a weight is too large for it."""
    source.model.to(dtype)
    for name, parameter in source.model.named_parameters():
        if not finite_range(parameter.detach()):
            text = str(dtype).removeprefix("torch.")
            raise ModelError(f"{source.name}: {name} holds weights beyond {text}; open it with --dtype bfloat16")
    return source


def open_as_saved(name: str, weights: Path | None, lazy: bool) -> Source:
    """Open the model that the user named, in the types of its files."""
    folder = named_path(name)
    if lazy and not ((folder if weights is None else weights) / "tersor.json").exists():
        raise InputError(f"{name}: only an artifact's entropy-coded weights can be left in their file; drop --lazy")
    if ":" in name and not folder.exists():
        return open_custom(name, weights, lazy)
    if folder.is_file():
        raise ModelError(
            f"{name}: a file, not a model; give its folder, or 'package.module:factory' with --weights {name}"
        )
    if not folder.exists():
        folder = from_hub(name)
    if (folder / "tersor.json").exists():
        return open_artifact(name, folder, lazy=lazy)
    if weights is not None:
        raise InputError(f"--weights goes with a model given as 'package.module:factory', and {name} is a folder")
    return open_transformers(name, folder)


def open_custom(name: str, weights: Path | None, lazy: bool = False) -> Source:
    """A model made by `package.module:factory`, filled from a state dict or from the artifact folder of its kind."""
    model = call_factory(name)
    if weights is not None and weights.is_dir():
        return open_artifact(f"{name} from {weights}", named_path(weights), model, lazy)
    notes: tuple[str, ...] = ("no --weights given: the factory's own weights are used",)
    num_bytes, hashes = 0, {"state": state_hash(model)} if weights is None else {}
    if weights is not None:
        own = frozenset(model.state_dict())
        state, prefix = without_prefix(read_state(weights), (*WRAPPED, "model."), own)
        try:
            model.load_state_dict(state)
            check_finite(dict(model.named_parameters()), str(weights))
        except RuntimeError as error:
            raise ModelError(f"{weights}: does not fit {name}: {str(error).splitlines()[-1].strip()}") from None
        notes = unwrapped(prefix, weights)
        num_bytes, hashes = weights.stat().st_size, {weights.name: sha256(weights)}
    return Source(model.eval(), name, "custom", name, None, num_bytes, hashes, notes)


def open_artifact(name: str, folder: Path, model: nn.Module | None = None, lazy: bool = False) -> Source:
    """A tersor artifact, as an input to measuring and comparing.

    An artifact of a custom model needs a fresh `model` to fill: the code that an artifact names is never run.
    """
    manifest = read_manifest(folder)
    factory = manifest["model"].get("factory")
    if factory and model is None:
        raise InputError(
            f"{name}: holds a custom model, and tersor runs no code that an artifact names; "
            f"name it yourself: '{factory}' with --weights {name}"
        )
    model = load(folder, model=model, lazy=lazy)
    file = weights_path(folder, manifest)
    hashes, num_bytes = {file.name: manifest["files"][file.name]["sha256"]}, file.stat().st_size
    return Source(model, name, "artifact", manifest["model"]["class"], folder, num_bytes, hashes)
