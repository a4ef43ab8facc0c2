"""Weights files in and out, with errors that say the file, the tensor and the way out: safetensors files, and those of
torch.save (pickled.py), which are only read.

A file is mapped into memory when it is read, and some kernels want their codes at a multiple of 64 bytes. Safetensors
leaves no room between tensors, so that those whose size is such a multiple come first here, after a header padded to
one. The others, which are few and small, are copied before a kernel sees them (nn/packed.py).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.core.errors import ArtifactError, ModelError
from tersor.core.memory import ALIGNMENT
from tersor.core.pickled import is_pickle, read_pickled

METADATA = {"format": "pt"}
DTYPE_NAMES = {  # the widest first, so that each begins at a multiple of its own width
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Described = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor by its name, type and shape
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


def in_file_order(tensors: Iterable[Described], alignment: int = ALIGNMENT) -> list[Described]:
    """The order in which a file holds tensors: those that end where the next may begin come first, of these and of the
    others the widest types, then by name. With an alignment of 1, that of the safetensors library."""

    def place(tensor: Described) -> tuple[bool, int, str]:
        name, dtype, shape = tensor
        return (size(dtype, shape) % alignment != 0, RANKS[dtype], name)

    return sorted(tensors, key=place)


def size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return torch.Size(shape).numel() * dtype.itemsize


def header(tensors: Iterable[Described], metadata: Mapping[str, str], alignment: int = ALIGNMENT) -> bytes:
    """The bytes before the data of a safetensors file: 8 bytes of length, and the JSON header.

    The header is padded so that the data begin at a multiple of `alignment`, or of 8.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in in_file_order(tensors, alignment):
        end = offset + size(dtype, shape)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    step = max(8, alignment)
    padded = encoded.ljust(-(-(8 + len(encoded)) // step) * step - 8)
    return len(padded).to_bytes(8, "little") + padded


def file_size(tensors: Iterable[Described], metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file with these tensors.

    >>> file_size([("a", torch.float16, (2, 3))], {}) - 128
    12
    """
    tensors = list(tensors)
    return len(header(tensors, metadata)) + sum(size(dtype, shape) for _, dtype, shape in tensors)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_weights(tensors: Mapping[str, Tensor], path: Path, alignment: int = ALIGNMENT) -> None:
    """Write one file; with an alignment of 1, the bytes that the safetensors library writes. Raises ArtifactError when
    the disk or the place refuses."""
    strange = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]
    if strange:
        raise ArtifactError(f"{path}: cannot write the weights: {strange[0]}, which tersor does not store; cast it")
    described = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    beside = path.with_name(f".{path.name}.part")  # the tensors may lie in the file that is to be replaced
    try:
        with beside.open("wb") as file:
            file.write(header(described, METADATA, alignment))
            for name, _, _ in in_file_order(described, alignment):
                file.write(bytes_of(tensors[name].detach().cpu().contiguous()))
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise ArtifactError(f"{path}: cannot write the weights: {error.strerror}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, of safetensors or of torch.save. Raises ModelError for damaged files and those that name
    code."""
    if is_pickle(path):
        return read_pickled(path)
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_file(path: Path) -> bool:
    """Raises as `read_weights` and `check_numbers` do, with one tensor in memory at a time; whether all is finite."""
    if is_pickle(path):
        return check_numbers(read_pickled(path), str(path))
    with opened(path) as file:
        names = list(file.keys())
    finite = True
    for name in names:
        with opened(path) as file:  # a mapped file keeps in memory what was read from it, until it is closed
            finite &= check_numbers({name: file.get_tensor(name)}, str(path))
    return finite


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, with its errors raised as ModelError."""
    refuse_pickle(path)
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        path.open("rb").close()
    except (OSError, ValueError) as error:  # no permission, or no name that a file can have
        raise ModelError(f"{str(path)[:200]}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download or save it again") from None


def refuse_pickle(path: Path) -> None:
    """Raises ModelError with the line that converts it, where a safetensors file is needed and this is none."""
    if is_pickle(path):
        raise ModelError(
            f"{path}: not a safetensors file, which is needed here; write one: "
            f'python -c "import torch, safetensors.torch as s; w = torch.load('
            f"'{path.name}', 'cpu', weights_only=True); "
            f"s.save_file({{k: v.clone() for k, v in w.items()}}, 'model.safetensors')\""
        )


def check_numbers(tensors: Mapping[str, Tensor], place: str) -> bool:
    """Raises ModelError naming the first tensor with a NaN; whether all are finite. Which tensors are buffers, where an
    infinity may be meant (a causal mask, the range an observer has seen), the model tells: see `check_finite`."""
    finite = True
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not finite_range(tensor):
            finite = False
            num_bad = int(tensor.isnan().sum())
            if num_bad:
                raise ModelError(f"{place}: {name}: {num_bad} of {tensor.numel()} values are NaN; retrain or repair it")
    return finite


def check_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raises ModelError naming the first tensor with a NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not finite_range(tensor):
            num_bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{place}: {name}: {num_bad} of {tensor.numel()} values are NaN or infinite; retrain or repair it"
            )


def finite_range(tensor: Tensor) -> bool:
    """True if smallest and largest value are finite, and so all are; without a mask as large as the tensor."""
    smallest, largest = (tensor if tensor.itemsize > 1 else tensor.float()).aminmax()  # NaN goes through
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))
