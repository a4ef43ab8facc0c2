"""Reading of models: a Hugging Face folder or hub id, an artifact, or `package.module:factory` with a state dict.

Weights that `tersor pack` made smaller open like those they came from.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.container import read
from tersor.checkpoint.guards import at_most, check_config, check_links, room_for, shapes_of
from tersor.checkpoint.layout import CODED, tensors_of
from tersor.core.errors import InputError, ModelError
from tersor.core.files import sha256
from tersor.core.messages import first_line
from tersor.core.pickled import is_pickle, without_prefix
from tersor.core.weights_file import check_file, check_finite, check_numbers, read_weights
from tersor.nn.copies import copy_but_sites, own_shared_weights
from tersor.nn.dtypes import Dtypes

HUB_FILES = ["*.safetensors", "*.tersor", "*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/*"]
PICKLED_HUB_FILES = ["pytorch_model*.bin"]  # where a model has no others
WEIGHT_NAMES = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # of whole files; shards have an index
WRAPPED = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


@dataclass(frozen=True)
class Source:
    """A model that was opened, and what is needed to write a smaller one like it.

    Attributes:
        model: the model in eval mode, on the CPU.
        name: the name that the user gave.
        kind: `transformers`, `custom` or `artifact`.
        architecture: the class, or the factory.
        folder: where config and tokenizer files lie; None for custom models.
        num_bytes: bytes of the weight files.
        hashes: sha256 of each weight file.
        notes: sentences for the user, such as on weights that the checkpoint lacks.
        dtypes: of parameters and buffers as they came, where the model computes in another type than it was saved in
            and what is written is to have them; else None.
    """

    model: nn.Module
    name: str
    kind: str
    architecture: str
    folder: Path | None = None
    num_bytes: int = 0
    hashes: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dtypes: Dtypes | None = None

    @property
    def title(self) -> str:
        """The name for files that others read: for a folder its last part, which does not reveal local paths."""
        place = Path(self.name).expanduser()
        return place.resolve().name if place.exists() else self.name

    def fresh(self) -> nn.Module | None:
        """An instance to fill with an artifact of this model; None where loading the artifact makes one itself."""
        if self.kind == "transformers":
            return None
        if ":" in self.architecture:
            return call_factory(self.architecture)
        made = copy_but_sites(self.model)
        own_shared_weights(made, self.model)
        return made


def open_transformers(name: str, folder: Path) -> Source:
    """Open a Hugging Face folder. Raises ModelError for damaged files, NaN, pickles that name code, and models that
    are quantized already."""
    config, model_class, files = look_into(name, folder)
    packed, finite, prefix = files[0].name == CODED, False, ""
    read = packed or is_pickle(files[0])
    if read:
        state = {key: tensor for file in files for key, tensor in read_state(file).items()}
        state, prefix = (state, "") if packed else without_prefix(state, WRAPPED)
        weights: dict[str, Any] = {"config": config, "state_dict": state}
    else:
        finite = min([check_file(file) for file in files])  # each one is read
        weights = {"use_safetensors": True}
    try:
        with at_most(room_for(shapes_of(files)), "the weights files and a new head have"):
            model, info = model_class.from_pretrained(
                None if read else folder, **weights, dtype="auto", output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # a config whose numbers do not go together can trip over anything
        raise ModelError(
            f"{name}: transformers cannot load it as {model_class.__name__}: {first_line(error)}"
        ) from None
    if not finite:
        check_finite(dict(model.named_parameters()), name)
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    unknown = unknown_architecture(config)
    if unknown and unused:
        raise ModelError(
            f"{name}: config.json names {unknown}, which transformers {transformers_version()} does not have, and "
            f"{type(model).__name__} has no place for {few(unused)}; {way_out(unknown, config)}"
        )
    notes = untied(model, name) + unwrapped(prefix, files[0])
    if unknown:
        notes += (f"config.json names {unknown}, which transformers does not have: opened as {type(model).__name__}",)
    if missing:
        notes += (f"the checkpoint lacks {few(missing)}: randomly initialized",)
    if unused:
        what = f"{model_class.__name__} does not use {few(unused)}"
        notes += (f"{what}: left out, and not counted in the original's size",)
    return Source(
        model=model.eval(),
        name=name,
        kind="transformers",
        architecture=type(model).__name__,
        folder=folder,
        # zero: counted from the model itself
        num_bytes=0 if unused or packed else sum(file.stat().st_size for file in files),
        hashes={file.name: sha256(file) for file in files},
        notes=notes,
    )


def look_into(name: str, folder: Path) -> tuple[Any, Any, list[Path]]:
    """The config, the class and the weight files of a Hugging Face folder. Raises as `open_transformers` does."""
    import transformers

    if not (folder / "config.json").exists():
        raise ModelError(
            f"{name}: no config.json, so not a Hugging Face model folder; "
            f"for your own model write 'package.module:factory' and --weights FILE.safetensors"
        )
    files = weight_files(folder)
    if not files:
        raise ModelError(
            f"{name}: no *.safetensors file in the folder and no pytorch_model.bin; save the model with save_pretrained"
        )
    quiet_transformers()
    check_links(folder)
    shapes = shapes_of(files)
    try:
        check_config(folder, shapes)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = transformers_class(config)
    except Exception as error:  # whatever a garbled config trips over
        raise ModelError(f"{folder / 'config.json'}: cannot be read ({first_line(error)})") from None
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name}: already quantized (see quantization_config); start from the float checkpoint")
    return config, model_class, files


def few(names: list[str]) -> str:
    """The first five names as text, with dots if there are more."""
    return ", ".join(names[:5]) + (" ..." if names[5:] else "")


def weight_files(folder: Path) -> list[Path]:
    """The files transformers loads: the single one, or the shards its index names, or whatever is there; where they
    were packed, the one that holds them all. Those of torch.save are for folders that have no others."""
    for stem, suffix in WEIGHT_NAMES:
        for name in (f"{stem}{suffix}", *([CODED] if suffix == ".safetensors" else [])):
            if (folder / name).exists():
                return [folder / name]
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            return shards_of(index, suffix)
        found = sorted(folder.glob("*.safetensors"))
        if found:
            return found
    return []


def shards_of(index: Path, suffix: str) -> list[Path]:
    """The files that an index names. Raises ModelError for a damaged index, and for names that lead elsewhere."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: cannot be read ({first_line(error)}); download it again") from None
    for name in shards:
        if not isinstance(name, str) or not is_inside(name, suffix):
            raise ModelError(f"{index}: names {str(name)[:80]!r}, which is no {suffix} file in the folder")
    return [index.parent / name for name in shards]


def is_inside(name: str, suffix: str = ".safetensors") -> bool:
    """True if a name of a weights file stays in the folder it is read from, and can be a file's."""
    parts = PurePosixPath(name).parts
    plain = all(part not in ("..", "/") and len(os.fsencode(part)) < 256 for part in parts)
    return plain and len(os.fsencode(name)) < 1024 and name.endswith(suffix) and "\0" not in name


def unwrapped(prefix: str, file: Path) -> tuple[str, ...]:
    """A note on the prefix that was removed from all names; none if there was no prefix."""
    if not prefix:
        return ()
    return (
        f"all names in {file.name} begin with {prefix!r}, which a wrapper such as DataParallel put there: left out",
    )


def transformers_class(config: Any) -> Any:
    """The class a config names; `AutoModel` when it names none that transformers has."""
    import transformers

    for architecture in getattr(config, "architectures", None) or []:
        found = getattr(transformers, architecture, None)
        # The bare base class is no model, and building it would change what transformers caches for all others.
        if isinstance(found, type) and transformers.PreTrainedModel in found.__mro__[1:]:
            return found
    return transformers.AutoModel


def unknown_architecture(config: Any) -> str:
    """The architecture that a config names, where transformers has none of the names; else empty."""
    import transformers

    names = [str(name) for name in getattr(config, "architectures", None) or []]
    return names[0] if names and transformers_class(config) is transformers.AutoModel else ""


def transformers_version() -> str:
    """The installed version of transformers."""
    import transformers

    return transformers.__version__


def way_out(unknown: str, config: Any) -> str:
    """The advice for an architecture that is not known; names the nearest that are."""
    import transformers

    prefix = type(config).__name__.removesuffix("Config")
    known = [name for name in dir(transformers) if name.startswith(f"{prefix}For") or name == f"{prefix}LMHeadModel"]
    near = difflib.get_close_matches(unknown, known, n=3, cutoff=0) or known[:3]
    instead = f"write the one that it is into config.json ({', '.join(near)}, ...), or " if near else ""
    return f"{instead}install the version of transformers that has it, or load it in a 'package.module:factory'"


def untied(model: Any, name: str) -> tuple[str, ...]:
    """Correct the config of a model whose file holds an output head though the config ties it to the embedding.

    That is so after an adapter was merged into one of the two. Returns notes.

    Raises ModelError for an encoder-decoder, which also computes otherwise where its config says so.
    """
    configs = [model.config, model.config.get_text_config()]
    pairs = model._tied_weights_keys
    if not isinstance(pairs, dict) or not any(getattr(c, "tie_word_embeddings", False) for c in configs):
        return ()
    found = dict(model.named_parameters(remove_duplicate=False))
    present = {target: source for target, source in pairs.items() if {target, source} <= found.keys()}
    apart = [target for target, source in present.items() if found[target] is not found[source]]
    if not apart:
        return ()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: config.json ties {few(apart)} to {present[apart[0]]}, and the file holds other weights; save the "
            f"model again with tie_word_embeddings as it is meant"
        )
    for target in present.keys() - set(apart):  # what is still one tensor would be missed when it is loaded
        place, _, last = target.rpartition(".")
        setattr(model.get_submodule(place), last, nn.Parameter(found[target].detach().clone()))
    for config in configs:
        config.tie_word_embeddings = False
    return (f"config.json ties {few(apart)} to {present[apart[0]]}, and the file holds other weights: kept apart",)


def read_state(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, one of torch.save, or a `model.tersor`. Raises ModelError for NaN, too;
    `check_finite` is for the parameters of the model that is filled."""
    state = read(path) if path.suffix == Path(CODED).suffix else read_weights(path)
    check_numbers(state, str(path))
    return state


FUNCTIONS = (type, FunctionType, BuiltinFunctionType)  # what has a module of its own; an instance has that of its class


def call_factory(name: str) -> nn.Module:
    """Import `package.module:factory` (the working folder is on the path) and call it."""
    factory = import_object(name, "model factory")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(f"{name} is {type(factory).__name__}, not a function that makes a model")
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be called without arguments ({error}); write a function that can") from None
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def import_object(name: str, what: str) -> Any:
    """Import the object `package.module:name`.

    Raises InputError if that fails, and for modules of Python itself: `os:abort` is nobody's model.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = None if is_pythons(module_name) else getattr(importlib.import_module(module_name), attribute)
        home = getattr(found, "__module__", None)
        if found is None or (isinstance(found, FUNCTIONS) and isinstance(home, str) and is_pythons(home)):
            raise ImportError(f"{attribute} is a part of Python, which makes no model")
        return found
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise InputError(f"{what} '{name}': {error}; write 'package.module:function', importable from here") from None


def is_pythons(module_name: str) -> bool:
    """True if a module is one of Python's own; a file of the user's of the same name is not."""
    root = module_name.partition(".")[0]
    if root not in (*sys.stdlib_module_names, "builtins", "_sitebuiltins"):
        return False
    spec = importlib.util.find_spec(root)
    origin = getattr(spec, "origin", None)
    if origin in (None, "built-in", "frozen"):
        return True
    return Path(origin).is_relative_to(sysconfig.get_path("stdlib"))


def from_hub(name: str) -> Path:
    """Download a hub id's safe files; a path that does not exist is never looked up there."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path or is_pickle(Path(name)):
        raise ModelError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not weight_files(folder):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, *PICKLED_HUB_FILES]))
        return folder
    except ModelError:
        raise
    except Exception as error:  # the hub client's errors have no common base of their own
        raise ModelError(f"{name}: no such folder, and not on the hub either ({first_line(error)})") from None


def quiet_transformers() -> None:
    """Silence transformers while it loads: tersor shows its own progress and errors."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def state_hash(model: nn.Module) -> str:
    """sha256 over everything a weights file would hold, for models that have no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
