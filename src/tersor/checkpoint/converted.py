"""Checkpoints whose tensors transformers names or joins anew when it loads them, such as experts stored one by one.

transformers keeps, for each kind of model, a table of patterns and operations. The names are looked up in that table
here, and its operations are run when a tensor is asked for: no more of the checkpoint is in memory than one tensor of
the model is made of.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tersor.checkpoint.safetensors_header import TensorSpan
from tersor.core.errors import ModelError
from tersor.core.messages import first_line
from tersor.core.weights_file import bytes_of


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, with its name there and the pattern that the table found in it."""

    name: str
    pattern: str
    span: TensorSpan


@dataclass(frozen=True)
class Converted:
    """A tensor of the model, made of some of the checkpoint when it is read.

    Attributes:
        name: name in the model.
        first: of what the operations make, the name that the table gives to all.
        shape: shape in the model.
        converter: transformers' own.
        model: the model that it belongs to.
    """

    name: str
    first: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    converter: Any
    model: Any

    @property
    def path(self) -> Path:
        """One of the files that the tensor comes from."""
        return self.sources[0].span.path

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].span.dtype

    def read(self) -> Tensor:
        """The tensor. Raises ModelError where the parts do not make what the model has."""
        converter = deepcopy(self.converter)
        for source in self.sources:
            converter.add_tensor(self.first, source.name, source.pattern, source.span.read())
        try:
            made = converter.convert(self.first, model=self.model, config=self.model.config)
            tensor: Any = made[self.name]
        except Exception as error:  # whatever parts that do not go together trip over
            raise ModelError(f"{self.path}: {self.name} cannot be put together ({first_line(error)})") from None
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        if tuple(tensor.shape) != self.shape:
            raise ModelError(
                f"{self.path}: the parts of {self.name} make {list(tensor.shape)}, but the model has "
                f"{list(self.shape)} here"
            )
        return tensor

    def copy_to(self, target: BinaryIO) -> None:
        """Append the bytes to an open file."""
        target.write(bytes_of(self.read().contiguous()))


def by_model_names(model: Any, stored: Mapping[str, TensorSpan]) -> dict[str, TensorSpan | Converted]:
    """The checkpoint under the names that the model has for its tensors; others keep theirs."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own = model.state_dict()
    found: dict[str, TensorSpan | Converted] = {}
    parts: dict[str, list[StoredTensor]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own:
            found[key] = stored[key]  # as it is, or not used
        elif pattern is None:
            found[name] = stored[key]
        else:
            parts.setdefault(name, []).append(StoredTensor(key, pattern, stored[key]))
    for first, sources in parts.items():
        converter = converter_of[sources[0].pattern]
        names = [first.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
        made = {name: own[name] for name in names if name in own}
        check_whole(first, sources, converter, sum(tensor.numel() for tensor in made.values()))
        for name, tensor in made.items():
            found[name] = Converted(name, first, tuple(tensor.shape), tuple(sources), converter, model)
    return found


MOVES = {"MergeModulelist", "Concatenate", "Chunk", "Transpose"}  # operations that neither add nor drop values


def check_whole(name: str, sources: Sequence[StoredTensor], converter: Any, num_values: int) -> None:
    """Before anything is read: no part is missing. Raises ModelError."""
    stored = sum(torch.Size(source.span.shape).numel() for source in sources)
    if stored != num_values and {type(operation).__name__ for operation in converter.operations} <= MOVES:
        raise ModelError(
            f"{sources[0].span.path.parent}: {sources[0].name} and the others that make up {name} hold {stored} "
            f"values, and the model has {num_values} there; download the checkpoint again"
        )
