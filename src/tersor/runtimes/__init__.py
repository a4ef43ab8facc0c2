"""Runtimes: what runs the files that tersor writes, each opened and fed in the same way.

`RUNTIMES` is the whole list. A new runtime is a file with a class that keeps the contract (contract.py) and a line in
`ROWS`.
"""

from pathlib import Path

from torch import dtype as DType

from tersor.core.errors import InputError, ModelError, UnknownName
from tersor.runtimes.contract import Decoder, Decodes, Feeds, Input, LayerTime, Profile, Runtime, Session
from tersor.runtimes.executorch import ExecuTorchRuntime
from tersor.runtimes.llama_cpp import LlamaCpp
from tersor.runtimes.onnx import OnnxRuntime
from tersor.runtimes.openvino import OpenVino
from tersor.runtimes.torch import Torch

__all__ = [
    "RUNTIMES",
    "Decoder",
    "Decodes",
    "Feeds",
    "Input",
    "LayerTime",
    "Profile",
    "Runtime",
    "Session",
    "open_decoder",
    "open_session",
    "runtime_for",
    "runtime_named",
]

ROWS: list[Runtime] = [
    Torch(),
    OnnxRuntime(),
    OpenVino(),
    OpenVino("openvino-bf16", precision="bf16"),
    ExecuTorchRuntime(),
    LlamaCpp(),
]
FILES = {suffix for runtime in ROWS for suffix in runtime.suffixes if suffix}
RUNTIMES = {runtime.name: runtime for runtime in ROWS}


def open_session(
    model: str,
    runtime: str | None = None,
    *,
    num_threads: int = 1,
    weights: Path | None = None,
    dtype: DType | None = None,
) -> Session:
    """Open a model in the runtime named, or in the first that opens such a file.

    Args:
        weights: the state dict, or the artifact, of a model given as `package.module:factory`.
        dtype: type that PyTorch computes in; None: the type the model was saved in.
    """
    found = runtime_for(model, runtime)
    if isinstance(found, Torch):
        return found.open(model, num_threads=num_threads, weights=weights, dtype=dtype)
    check_no_dtype(model, dtype)
    if weights is not None:
        raise InputError(f"--weights goes with a model given as 'package.module:factory', and {model} is a file")
    return found.open(model, num_threads=num_threads)


def check_no_dtype(model: str, dtype: DType | None) -> None:
    """Raises InputError where a type is asked of a file that has types of its own."""
    if dtype is not None:
        raise InputError(
            f"--dtype goes with models that PyTorch runs, and the types of {model} are fixed; leave it out, or export "
            f"the model anew with --dtype"
        )


def open_decoder(
    model: str, runtime: str | None = None, *, num_threads: int = 1, dtype: DType | None = None
) -> Decoder:
    """Open a language model to read and write token by token, in the runtime named, or in the first that opens such a
    file. Raises InputError for a runtime that does not do that."""
    found = runtime_for(model, runtime)
    if isinstance(found, Torch):
        return found.open_decoder(model, num_threads=num_threads, dtype=dtype)
    check_no_dtype(model, dtype)
    if not isinstance(found, Decodes):
        able = ", ".join(runtime.name for runtime in ROWS if isinstance(runtime, Decodes))
        raise InputError(f"{model}: {found.name} does not run language models token by token; these do: {able}")
    return found.open_decoder(model, num_threads=num_threads)


def runtime_named(name: str) -> Runtime:
    """The runtime that `--runtime` names."""
    if name not in RUNTIMES:
        raise UnknownName("runtime", name, RUNTIMES)
    return RUNTIMES[name]


def runtime_for(model: str, name: str | None = None) -> Runtime:
    """The runtime of a model: the one named, or the first that opens such a file; folders and factories are torch's.

    Raises InputError where the named runtime does not open such a file, ModelError where the file is not there.
    """
    suffix = Path(model).suffix if Path(model).is_file() or Path(model).suffix in FILES else ""
    if suffix and not Path(model).is_file():
        raise ModelError(f"{model}: no such file")
    if name is not None:
        runtime = runtime_named(name)
        if suffix not in runtime.suffixes:
            opened = ", ".join(each or "folders" for each in runtime.suffixes)
            raise InputError(f"{model}: {name} opens {opened}; export the model first: tersor export MODEL --to onnx")
        return runtime
    found = next((runtime for runtime in ROWS if suffix in runtime.suffixes), None)
    if found is None:
        known = sorted({each for runtime in ROWS for each in runtime.suffixes if each})
        raise InputError(f"{model}: no runtime opens *{suffix}; known are folders, {', '.join(known)}")
    return found
