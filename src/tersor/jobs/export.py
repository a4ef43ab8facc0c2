"""The job of `tersor export`: writes a model in the file layout of another runtime (a client), value for value.

Clients that run here (`Runnable`) take any model, and what they are given is opened, compared and timed before it is
kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from tersor.activations.quantizers import Activation
from tersor.checkpoint.artifact import load
from tersor.checkpoint.layout import packed_sites, unpacked_tensors
from tersor.checkpoint.manifest import MANIFEST, read_manifest
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.output import Foreign, atomic_file, atomic_folder, claimed
from tersor.checkpoint.seal import seal
from tersor.core.errors import FormatError, InputError, ModelError
from tersor.core.progress import Events
from tersor.core.scratch import scratch_folder
from tersor.exporters import EXPORTS, export_named
from tersor.exporters.check import Check, check
from tersor.exporters.contract import Checkpoint, Filed, PackedSite, Runnable, WeightLayout
from tersor.exporters.decoder import has_cache
from tersor.exporters.examples import Examples, examples_of, with_cache
from tersor.exporters.reopen import reopen
from tersor.exporters.rescaled import for_any_processor
from tersor.jobs.settings import Output
from tersor.runtimes.exactness import exactness
from tersor.tasks.data import Data

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # as clients name them


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote, and how they were checked.

    Attributes:
        output: the folder or file.
        to: the client's name in the table.
        num_bytes: bytes of everything written.
        formats: the scheme stored for each layer, as recipes write it.
        notes: sentences for the user, such as that the client rounds a value.
        check: comparison of the file's outputs with the model's, for clients that run here.
        opened: a sentence on opening the file in its client, for all others.
    """

    output: Path
    to: str
    num_bytes: int
    formats: dict[str, str]
    notes: tuple[str, ...]
    check: Check | None = None
    opened: str | None = None


@dataclass(frozen=True)
class ExampleInputs:
    """The choice of example inputs, which clients that run here need.

    Attributes:
        data: a task whose examples are used; with none chosen, inputs are made up to suit the model.
        shape: shape of one random example instead, for models of one array.
        fixed: axes that keep the examples' size, such as `sequence`.
    """

    data: Data = field(default_factory=Data)
    shape: Sequence[int] | None = None
    fixed: Sequence[str] = ()


def export(
    model: ModelSpec,
    output: Output,
    to: str,
    options: Mapping[str, Any] = {},
    examples: ExampleInputs = ExampleInputs(),
    num_threads: int = 1,
    events: Events = Events(),
) -> Exported:
    """Write a model as `output`, which `to` (a name in `EXPORTS`) loads unchanged.

    Args:
        model: an artifact folder; for clients that run here also a Hugging Face folder, or `package.module:factory`.
            Its `dtype` is what the client computes in beside integers, where the client can choose.
        options: fields of the client, such as `decode`.
        num_threads: while the result is timed.

    Raises:
        UnknownName: no such client.
        InputError: the model is none that the client takes, or the output is in the way.
        FormatError: the client cannot hold a site, or the model; the message names the rule to change.
        ModelError: what was written does not compute what the model computes, or an operator is not supported.
        MissingExtra: the client's package is needed to write, and is not installed.
    """
    client = export_named(to)
    if model.dtype is not None and "dtype" in options_of(client):
        options, model = {"dtype": TYPES[model.dtype], **options}, replace(model, dtype=None)
    client = with_options(client, options)
    check_suffix(output.path, client)
    with claimed(output.path, output.overwrite, *standing(client, output.path)):
        checkpoint = open_for(client, model, examples)
        check_sites(checkpoint, client)
        rescaled: tuple[str, ...] = ()
        if getattr(client, "cpu", None) == "any":
            checkpoint, rescaled = for_any_processor(checkpoint)
        checked, opened = None, None
        with place_for(output.path, client, output.overwrite) as working:
            if isinstance(client, Runnable):
                with scratch_folder() as scratch:
                    written = client.write(checkpoint, working, scratch)
                    checked = check(client, checkpoint, working, written, num_threads)
                known = exactness(written.file or working)
                overflowing = (str(known),) if known is not None and known.overflowing else ()
                notes = (*rescaled, *written.notes, *overflowing)
            else:
                notes = tuple(client.write(checkpoint, working))
                opened = reopen(client, checkpoint, working)
            if working.is_dir():
                seal(working)
            files = working.rglob("*") if working.is_dir() else working.parent.iterdir()
            num_bytes = sum(file.stat().st_size for file in files if file.is_file())
        for note in notes:
            events.on_note(note)
        formats = {packed.site.name: packed.scheme for packed in checkpoint.sites}
        return Exported(output.path, client.name, num_bytes, formats, notes, checked, opened)


def open_for(client: WeightLayout, model: ModelSpec, examples: ExampleInputs) -> Checkpoint:
    """The model as a client takes it. Raises InputError for what it does not take."""
    if isinstance(client, Runnable):
        return open_any(model, examples, cache=getattr(client, "cache", False))
    given = (("--weights", model.weights), ("--data", examples.data.is_given), ("--shape", examples.shape))
    for what, value in (*given, ("--fixed", examples.fixed)):
        if value:
            raise InputError(f"{client.name} takes no {what}")
    if not (Path(model.name) / MANIFEST).exists():
        raise InputError(
            f"{model.name}: no {MANIFEST}, so not a tersor artifact; make one with `tersor compress` first"
        )
    return open_checkpoint(Path(model.name), model.dtype)


def client_for(output: Path) -> str:
    """The client that writes files of an output's suffix. Raises InputError where none does, or several do."""
    names = [client.name for client in EXPORTS.values() if client.suffix and client.suffix == output.suffix]
    if len(names) != 1:
        raise InputError(f"{output}: name the client that it is for: {', '.join(names or EXPORTS)}")
    return names[0]


def options_of(client: WeightLayout) -> list[str]:
    """The options that a client takes."""
    return [each.name for each in fields(client)]  # type: ignore[arg-type]


def with_options(client: WeightLayout, options: Mapping[str, Any]) -> Any:
    """The client with some of its fields changed. Raises InputError for one that it does not have."""
    known = options_of(client)
    for name in options:
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InputError(f"{client.name} takes no option {name.replace('_', '-')}; its options: {takes}")
    return replace(client, **options)  # type: ignore[type-var]


def open_any(model: ModelSpec, examples: ExampleInputs = ExampleInputs(), cache: bool = False) -> Checkpoint:
    """Open an artifact or any model, with example inputs: those of a language model with its `cache`, if asked for."""
    source, shape, data = model.open(), examples.shape, examples.data
    if shape is not None and data.is_given:
        raise InputError("--shape and --data both give example inputs; leave one out")
    has_tokenizer = source.folder is not None and any("tokenizer" in path.name for path in source.folder.iterdir())
    task = data.open(source) if data.is_given or (has_tokenizer and shape is None) else None
    made: Examples = examples_of(source, task, shape)
    if cache and shape is None and has_cache(source.model):
        if examples.fixed:
            raise InputError(f"--fixed {examples.fixed[0]} goes with --no-cache: a cache grows with every token")
        made = with_cache(source.model, made)
    made = made.fixed(examples.fixed)
    return checkpoint_of(source.folder or Path(model.name), source.model, made)


def open_checkpoint(artifact: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """Load an artifact of a Hugging Face model, to compute in `dtype`; None: as it was saved."""
    if not (artifact / "config.json").exists():
        kind = read_manifest(artifact)["model"].get("class")
        raise InputError(f"{artifact} holds a custom model ({kind}); the clients read Hugging Face models only")
    return checkpoint_of(artifact, load(artifact, dtype=dtype))


def checkpoint_of(folder: Path, model: Any, examples: Examples | None = None) -> Checkpoint:
    """The model's packed layers, and everything else that its files hold."""
    sites = tuple(
        PackedSite(site, packed.encoded, Activation(quantizer.format, quantizer.tensors) if quantizer else None)
        for site, packed, quantizer in packed_sites(model)
    )
    return Checkpoint(folder, model, sites, unpacked_tensors(model), examples)


def check_sites(checkpoint: Checkpoint, export: WeightLayout) -> None:
    """Check, before anything is written, that the client can hold every layer and the model as a whole."""
    if isinstance(export, Runnable) and getattr(getattr(checkpoint.model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{checkpoint.folder}: {type(checkpoint.model).__name__} is an encoder with a decoder, which {export.name} "
            f"would need as two graphs; export its encoder alone (a *EncoderModel class), or to compressed-tensors"
        )
    floats = isinstance(export, Runnable) or (bool(checkpoint.sites) and getattr(export, "holds_floats", False))
    if not checkpoint.quantized and not floats:
        raise ModelError(f"{checkpoint.folder}: no weight is quantized, so there is nothing to export to {export.name}")
    misfits = [(packed, why_not) for packed in checkpoint.sites if (why_not := export.why_not(packed))]
    if misfits:
        packed, why_not = misfits[0]
        others = f" ({len(misfits) - 1} more sites do not fit either)" if misfits[1:] else ""
        decode = ", or write it with decoded weights by --decode" if isinstance(export, Runnable) else ""
        raise FormatError(
            f"{export.name} holds {why_not.holds}; {packed.site.name} is {packed.scheme}{others}; "
            f"compress again with --rule '{packed.site.name}={why_not.instead}'{decode}"
        )
    export.check(checkpoint)


def check_suffix(output: Path, export: WeightLayout) -> None:
    """Raise InputError if a client that writes one file is given a name without its suffix."""
    if export.suffix and output.suffix != export.suffix:
        raise InputError(f"{output}: {export.name} writes one file; name it {output.with_suffix(export.suffix)}")


def standing(export: WeightLayout, output: Path) -> tuple[Foreign, Sequence[str]] | tuple[()]:
    """For a client of files: what tells whether one that stands at the output may be replaced, and the names of the
    files that may be written beside it."""
    return (export.foreign, export.beside(output)) if isinstance(export, Filed) else ()


def place_for(output: Path, export: WeightLayout, overwrite: bool) -> AbstractContextManager[Path]:
    """A temporary place to write to: it replaces `output` when the block ends well, and vanishes when it does not."""
    if not isinstance(export, Filed):
        return atomic_folder(output, overwrite)
    return atomic_file(output, overwrite, *standing(export, output))
