"""Safetensors files in and out, with errors that say the file, the tensor and the way out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.errors import ArtifactError, ModelError

METADATA = {"format": "pt"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file; raises ArtifactError when the disk or the place refuses."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        pointer = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if pointer in storages else own  # safetensors refuses tensors that share memory
        storages.add(pointer)
    try:
        save_file(apart, path, METADATA)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot write the weights: {error}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of one file. Raises ModelError for pickles and damaged files."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_file(path: Path) -> None:
    """Raises as `read_weights` and `check_finite` do, with one tensor in memory at a time."""
    with opened(path) as file:
        names = list(file.keys())
    for name in names:
        with opened(path) as file:  # a mapped file keeps in memory what was read from it, until it is closed
            check_finite({name: file.get_tensor(name)}, str(path))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with its errors translated."""
    refuse_pickle(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download or save it again") from None


def refuse_pickle(path: Path) -> None:
    """Raises ModelError with the way to convert it, if the file's ending says it is a pickle."""
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path}: a pickle can run any code when it is opened, so tersor does not. If you trust it, convert it: "
            f'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path.name}', map_location='cpu', weights_only=True), 'model.safetensors')\""
        )


def check_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Raises ModelError naming the first tensor with a NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not finite_range(tensor):
            num_bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{place}: {name}: {num_bad} of {tensor.numel()} values are NaN or infinite; retrain or repair it"
            )


def finite_range(tensor: Tensor) -> bool:
    """Whether smallest and largest value are finite, and so all are; without a mask as large as the tensor."""
    smallest, largest = (tensor if tensor.itemsize > 1 else tensor.float()).aminmax()  # NaN goes through
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))
