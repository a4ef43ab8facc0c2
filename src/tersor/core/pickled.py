"""Weights that `torch.save` wrote (`.pt`, `.pth`, `.bin`, `.ckpt`), read without running any code.

Such a file is a pickle, which can name any function to be called when it is opened. `torch.load(weights_only=True)`
knows a few names that build tensors and plain containers, and refuses every other. What it refuses is refused here with
the line that writes the weights alone, for those who trust the file. The tensors stay in the file, mapped into memory,
where its format allows.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tersor.core.errors import ModelError
from tersor.core.messages import first_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar")  # .pth.tar
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params")  # where a state dict may lie
LARGEST = 16  # times the file, and so many MiB, that the tensors of a file may take in memory
NAMED = re.compile(r"GLOBAL (\S+)")  # in torch's message
OBJECTS = ("TorchScript", "legacy .tar", "Unsupported class", "unrecognized function", "Can only build")  # there, too


def is_pickle(path: Path) -> bool:
    """True if the ending of a file says that `torch.save` or `pickle` wrote it."""
    return path.suffix.lower() in PICKLES


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict of a file: the whole of it, or what it holds as `state_dict`, `model`, ...

    Raises ModelError for a file that is damaged, names code, holds no state dict, or claims tensors that it does not
    have the bytes for.
    """
    records = check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file can trip over anything
        raise refusal(path, error) from None
    state = {name: tensor.detach() for name, tensor in state_dict_in(content, path).items()}
    check_claims(state, path)
    if records is not None:
        check_records(state, records, path)
    return {name: (tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor) for name, tensor in state.items()}


def check_archive(path: Path) -> Counter[int] | None:
    """The sizes of an archive's records of numbers, with how many there are of each; None for a file of the older kind.

    Raises ModelError for a file that is not there, or an archive whose records are compressed: torch writes none, and a
    small one could unpack to any size.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        size = path.stat().st_size
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(f"{str(path)[:200]}: cannot be read ({reason}); download or save it again") from None
    if any(record.compress_type != zipfile.ZIP_STORED or record.file_size > size for record in records):
        raise ModelError(f"{path}: its records are compressed, which torch.save never does; save it again")
    return Counter(record.file_size for record in records if "/data/" in record.filename)


def refusal(path: Path, error: Exception) -> ModelError:
    """The error for a file that torch could not read: says why, and the way out."""
    text = str(error)
    named = NAMED.search(text)
    if named or any(words in text for words in OBJECTS):
        what = named[1] if named else "objects"
        return ModelError(
            f"{path}: holds more than weights: {what}, whose code would run when it is opened; tersor runs none. If "
            f"you trust the file, write its weights alone, where that code can be imported: {conversion(path)}"
        )
    return ModelError(f"{path}: not a whole file of torch.save ({first_line(error)}); download or save it again")


def conversion(path: Path) -> str:
    """The line that writes the weights of a file alone, whether it holds a module or a dictionary with a state dict."""
    whole = f"torch.load('{path.name}', 'cpu', weights_only=False)"
    weights = "m.state_dict() if hasattr(m, 'state_dict') else m.get('state_dict', m.get('model', m))"
    return f"python -c \"import torch; m = {whole}; torch.save({weights}, 'weights.pt')\""


def state_dict_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The state dict among what a file holds. Raises ModelError where there is none."""
    if is_state_dict(content):
        return content
    if isinstance(content, Mapping):
        for name in WRAPPERS:
            inner = content.get(name)
            if is_state_dict(inner):
                return inner
            if isinstance(inner, Mapping) and name == "model":
                return state_dict_in(inner, path)
        strange = [f"{name!r} is {type(value).__name__}" for name, value in content.items() if not is_tensor(value)]
        listed = ", ".join(strange[:4]) + (" ..." if strange[4:] else "")
        raise ModelError(f"{path}: holds no state dict: {listed or 'it is empty'}; {way_out(path)}")
    raise ModelError(f"{path}: holds {type(content).__name__}, and no state dict; {way_out(path)}")


def way_out(path: Path) -> str:
    """The advice for a file without a state dict that can be found."""
    known = ", ".join(WRAPPERS)
    return f"save the state dict alone by torch.save(model.state_dict(), '{path.name}'), or under one of {known}"


def is_state_dict(content: Any) -> TypeGuard[Mapping[str, Tensor]]:
    """True for a dictionary of tensors that is not empty."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and is_tensor(value) for name, value in content.items())


def is_tensor(value: Any) -> bool:
    """True for a tensor of any kind."""
    return isinstance(value, Tensor)


def check_claims(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ModelError for tensors that are not plain numbers on the CPU, or would take much more than the file."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            kind = kind if tensor.device.type == "cpu" else f"on the device {tensor.device}"
            raise ModelError(f"{path}: {name} is {kind}, and tersor takes plain tensors; save it as a plain one")
    claimed, size = sum(tensor.nbytes for tensor in state.values()), path.stat().st_size
    if claimed > LARGEST * (size + 2**20):
        raise ModelError(f"{path}: {size:,} bytes that claim tensors of {claimed:,} bytes; save it again")


def check_records(state: Mapping[str, Tensor], records: Counter[int], path: Path) -> None:
    """Raises ModelError for a tensor whose numbers are not one whole record of the archive: torch maps as many bytes as
    the pickle says, be they another tensor's."""
    storages = {tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize: tensor for tensor in state.values()}
    left = records - Counter()
    for storage in (tensor.untyped_storage() for tensor in storages.values() if tensor.numel()):
        if not left[storage.nbytes()]:
            raise ModelError(f"{path}: its records are shorter or longer than its tensors; download or save it again")
        left[storage.nbytes()] -= 1


def without_prefix(
    state: Mapping[str, Tensor], prefixes: tuple[str, ...], names: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], str]:
    """A state dict whose names no longer begin with what a wrapper put before all of them, and what that was.

    Args:
        prefixes: what may be taken off, such as `module.` of DataParallel.
        names: names of the model's own tensors; a prefix that they begin with stays.

    >>> state, prefix = without_prefix({"module.a": torch.zeros(1), "module.b": torch.zeros(1)}, ("module.",))
    >>> list(state), prefix
    (['a', 'b'], 'module.')
    """
    taken = ""
    while state and not any(name in names for name in state):
        prefix = next((each for each in prefixes if all(name.startswith(each) for name in state)), None)
        if prefix is None:
            break
        state, taken = {name.removeprefix(prefix): tensor for name, tensor in state.items()}, taken + prefix
    return dict(state), taken
