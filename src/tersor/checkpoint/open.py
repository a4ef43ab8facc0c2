"""Opens the model that the user named: a Hugging Face model, a tersor artifact, or a model of their own."""

from pathlib import Path

import torch
from torch import nn

from tersor.checkpoint.artifact import load, read_manifest, weights_path
from tersor.checkpoint.guards import named_path
from tersor.checkpoint.source import Source, call_factory, from_hub, open_transformers, read_state, state_hash
from tersor.core.errors import InputError, ModelError
from tersor.core.files import sha256
from tersor.core.weights_file import check_finite, finite_range, refuse_pickle


def open_model(
    name: str, *, weights: Path | None = None, lazy: bool = False, dtype: torch.dtype | None = None
) -> Source:
    """Open what the user named. Raises ModelError or InputError, each with the way out.

    Args:
        lazy: leave the entropy-coded sites of an artifact in their file until they run.
        dtype: what the model computes in; None: as it was saved.
    """
    source = open_as_saved(name, weights, lazy)
    return source if dtype is None else cast(source, dtype)


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
        refuse_pickle(folder)
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
        state = read_state(weights)
        try:
            model.load_state_dict(state)
            check_finite(dict(model.named_parameters()), str(weights))
        except RuntimeError as error:
            raise ModelError(f"{weights}: does not fit {name}: {str(error).splitlines()[-1].strip()}") from None
        notes, num_bytes, hashes = (), weights.stat().st_size, {weights.name: sha256(weights)}
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
