"""PyTorch itself: artifacts, Hugging Face folders and `package.module:factory`, run as tersor runs them."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.checkpoint.open import open_model
from tersor.checkpoint.source import Source
from tersor.core.errors import InputError
from tersor.core.threads import threads
from tersor.nn.packed import PackedLinear
from tersor.runtimes.contract import Decoder, Feeds, Input, Profile, Session, check_feeds
from tersor.runtimes.torch_decoder import TorchDecoder
from tersor.runtimes.torch_profile import profile

TEXT = ("input_ids", "attention_mask")  # of a Hugging Face model that reads tokens


@dataclass(frozen=True)
class Torch:
    """The runtime `torch`, which runs model folders and factories."""

    name: str = "torch"
    suffixes: tuple[str, ...] = ("",)

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def open(
        self,
        path: str | Path,
        *,
        num_threads: int = 1,
        weights: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Session:
        """`weights` is the state dict, or the artifact, of a model given as `package.module:factory`; `dtype` what it
        computes in, as it was saved without."""
        source = open_model(str(path), weights=weights, dtype=dtype)
        return TorchSession(source.model, str(path), num_threads, source)

    def open_decoder(self, path: str | Path, *, num_threads: int = 1, dtype: torch.dtype | None = None) -> Decoder:
        return TorchDecoder(open_model(str(path), dtype=dtype).model, str(path), num_threads)


class TorchSession:
    """A model in memory. Its inputs are those of a Hugging Face config, or what its first layer takes; `source` is
    where it came from, if it came from somewhere."""

    def __init__(self, model: nn.Module, name: str, num_threads: int = 1, source: Source | None = None):
        self.model, self.name, self.num_threads, self.source = model.eval(), name, num_threads, source
        self.inputs = inputs_of(model, name)
        self.dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        check_feeds(feeds, self.inputs, self.name)
        arguments = {name: as_taken(torch.from_numpy(array), self.dtype) for name, array in feeds.items()}
        with torch.inference_mode(), threads(self.num_threads):
            return named_outputs(self.model(**arguments))

    def profile(self, feeds: Feeds, num_runs: int = 10) -> Profile:
        """Profile by a stopwatch around every module, every decoding and every operator that Python calls."""
        check_feeds(feeds, self.inputs, self.name)
        arguments = {name: as_taken(torch.from_numpy(array), self.dtype) for name, array in feeds.items()}
        with torch.inference_mode(), threads(self.num_threads):
            return profile(self.model, lambda: self.model(**arguments), num_runs)


def as_taken(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in the type that a model computes in; names of tokens as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def inputs_of(model: nn.Module, name: str) -> tuple[Input, ...]:
    """The inputs that a model needs, by its Hugging Face config, or by its forward's first argument and first layer.

    Raises InputError if neither shows them.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        taken = inspect.signature(model.forward).parameters
        return tuple(Input(each, np.dtype("int64"), (None, None)) for each in TEXT if each in taken)
    if main == "pixel_values":
        size = getattr(config, "image_size", None)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (None, getattr(config, "num_channels", 3), height, width)
        return (Input("pixel_values", np.dtype("float32"), shape),)
    first = next((each for each in model.modules() if layer_shape(each)), None)
    arguments = [
        each.name
        for each in inspect.signature(model.forward).parameters.values()
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    if first is None or len(arguments) != 1:
        raise InputError(
            f"{name}: cannot tell what it must be fed ({type(model).__name__}.forward takes "
            f"{', '.join(arguments) or 'nothing by name'}); give data: --task and --data"
        )
    dtype = "int64" if isinstance(first, nn.Embedding) else "float32"
    return (Input(arguments[0], np.dtype(dtype), layer_shape(first) or ()),)


def layer_shape(module: nn.Module) -> tuple[int | None, ...] | None:
    """The shape of the input of a layer that may stand first in a model; None for any other module."""
    if isinstance(module, nn.Embedding):
        return (None, None)
    if isinstance(module, nn.Linear | PackedLinear):
        return (None, module.in_features)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (None, module.in_channels, *(None for _ in module.kernel_size))
    if isinstance(module, nn.RNNBase):
        return (None, None, module.input_size)
    return None


def named_outputs(output: Any) -> dict[str, np.ndarray]:
    """All tensors that a model returned; `output`, or `output_0` and so on, where they have no names."""
    if isinstance(output, Tensor):
        return {"output": to_numpy(output)}
    if isinstance(output, Mapping):  # Hugging Face's ModelOutput
        return {name: to_numpy(value) for name, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, tuple | list):
        return {f"output_{i}": to_numpy(value) for i, value in enumerate(output) if isinstance(value, Tensor)}
    raise InputError(f"the model returned {type(output).__name__}, which holds no tensors")


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as an array; NumPy has no bfloat16, so that becomes float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
