"""An artifact written anew in a client's layout, with exactly the values that were chosen.

Clients that run here (`Runnable`) take any model, and what they are given is opened, compared and timed before it is
kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tersor.activations.quantizers import Activation
from tersor.checkpoint.artifact import load
from tersor.checkpoint.layout import packed_sites, unpacked_tensors
from tersor.checkpoint.manifest import MANIFEST, read_manifest
from tersor.checkpoint.open import open_model
from tersor.checkpoint.output import Foreign, atomic_file, atomic_folder, check_output
from tersor.checkpoint.seal import seal
from tersor.core.errors import FormatError, InputError, ModelError
from tersor.core.scratch import scratch_folder
from tersor.export import export_named
from tersor.export.check import Check, check
from tersor.export.contract import Checkpoint, Filed, PackedSite, Runnable, WeightLayout
from tersor.export.decoder import has_cache
from tersor.export.examples import Examples, examples_of, with_cache
from tersor.export.reopen import reopen
from tersor.jobs.task_choice import TaskChoice, open_task_for


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        output: the folder or file.
        to: the client's name in the table.
        num_bytes: of everything written.
        formats: what was stored for each site, as recipes spell it.
        notes: what the user should know, such as a value the client rounds.
        check: what running it showed, for clients that run here.
        opened: what opening it in its client showed, for all others.
    """

    output: Path
    to: str
    num_bytes: int
    formats: dict[str, str]
    notes: tuple[str, ...]
    check: Check | None = None
    opened: str | None = None


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    to: str,
    options: Mapping[str, Any] = {},
    weights: str | Path | None = None,
    task_choice: TaskChoice | None = None,
    shape: Sequence[int] | None = None,
    fixed: Sequence[str] = (),
    num_threads: int = 1,
    overwrite: bool = False,
) -> Exported:
    """Write `model` as `output`, which `to` (a name in `EXPORTS`) loads unchanged.

    Args:
        model: an artifact folder; for clients that run here also a Hugging Face folder, or `package.module:factory`.
        options: fields of the client, such as `dtype`.
        weights: a state dict or artifact folder for a `package.module:factory`.
        task_choice: whose data gives the example inputs of clients that run here; None takes what suits the model.
        shape: of one random example instead, for models of one array.
        fixed: axes that keep the examples' size, such as `sequence`.
        num_threads: while the result is timed.

    Raises:
        UnknownName: no such client.
        InputError: the model is none that the client takes, or the output is in the way.
        FormatError: the client cannot hold a site, or the model; the message names the rule to change.
        ModelError: what was written does not compute what the model computes, or an operator is not supported.
        MissingExtra: the client's package is needed to write, and is not installed.
    """
    export, output = with_options(export_named(to), options), Path(output)
    check_suffix(output, export)
    check_output(output, overwrite, *standing(export, output))
    if isinstance(export, Runnable):
        checkpoint = open_any(
            str(model),
            Path(weights) if weights else None,
            task_choice=task_choice,
            shape=shape,
            fixed=fixed,
            cache=getattr(export, "cache", False),
        )
    else:
        for what, given in (("--weights", weights), ("--data", task_choice), ("--shape", shape), ("--fixed", fixed)):
            if given:
                raise InputError(f"{to} takes no {what}")
        if not (Path(model) / MANIFEST).exists():
            raise InputError(f"{model}: no {MANIFEST}, so not a tersor artifact; make one with `tersor compress` first")
        checkpoint = open_checkpoint(Path(model))
    check_sites(checkpoint, export)
    checked, opened = None, None
    with place_for(output, export, overwrite) as working:
        if isinstance(export, Runnable):
            with scratch_folder() as scratch:
                written = export.write(checkpoint, working, scratch)
                checked = check(export, checkpoint, working, written, num_threads)
            notes = written.notes
        else:
            notes = tuple(export.write(checkpoint, working))
            opened = reopen(export, checkpoint, working)
        if working.is_dir():
            seal(working)
        files = working.rglob("*") if working.is_dir() else working.parent.iterdir()
        num_bytes = sum(file.stat().st_size for file in files if file.is_file())
    formats = {packed.site.name: packed.scheme for packed in checkpoint.sites}
    return Exported(output, export.name, num_bytes, formats, notes, checked, opened)


def with_options(export: WeightLayout, options: Mapping[str, Any]) -> Any:
    """The client with some of its fields changed. Raises InputError for one that it does not have."""
    known = {field.name for field in fields(export)}  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InputError(f"{export.name} takes no option {name.replace('_', '-')}; its options: {takes}")
    return replace(export, **options)  # type: ignore[type-var]


def open_any(
    name: str,
    weights: Path | None,
    *,
    task_choice: TaskChoice | None = None,
    shape: Sequence[int] | None = None,
    fixed: Sequence[str] = (),
    cache: bool = False,
) -> Checkpoint:
    """Open an artifact or any model, with example inputs: those of a language model with its `cache`, if asked for."""
    source = open_model(name, weights=weights)
    if shape is not None and task_choice is not None:
        raise InputError("--shape and --data both give example inputs; leave one out")
    has_tokenizer = source.folder is not None and any("tokenizer" in path.name for path in source.folder.iterdir())
    task = None
    if task_choice is not None or (has_tokenizer and shape is None):
        task = open_task_for(source, task_choice or TaskChoice())
    examples: Examples = examples_of(source, task, shape)
    if cache and shape is None and has_cache(source.model):
        if fixed:
            raise InputError(f"--fixed {fixed[0]} goes with --no-cache: a cache grows with every token")
        examples = with_cache(source.model, examples)
    examples = examples.fixed(fixed)
    return checkpoint_of(source.folder or Path(name), source.model, examples)


def open_checkpoint(artifact: Path) -> Checkpoint:
    """Load an artifact of a Hugging Face model."""
    if not (artifact / "config.json").exists():
        kind = read_manifest(artifact)["model"].get("class")
        raise InputError(f"{artifact} holds a custom model ({kind}); the clients read Hugging Face models only")
    return checkpoint_of(artifact, load(artifact))


def checkpoint_of(folder: Path, model: Any, examples: Examples | None = None) -> Checkpoint:
    """The model's packed sites, and all else."""
    sites = tuple(
        PackedSite(site, packed.encoded, Activation(quantizer.format, quantizer.tensors) if quantizer else None)
        for site, packed, quantizer in packed_sites(model)
    )
    return Checkpoint(folder, model, sites, unpacked_tensors(model), examples)


def check_sites(checkpoint: Checkpoint, export: WeightLayout) -> None:
    """Before anything is written: every site fits, and the model as a whole."""
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
    """Before any work: a client of one file is given the name of one. Raises InputError."""
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
