"""A model as a graph of PyTorch operators in which every packed weight has become the operators that XNNPACK fuses.

`torch.export` follows the model; where it meets a packed module, layers.py says which operators it leaves. The axes of
any size get a largest one, for ExecuTorch plans its memory beforehand.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tersor.core.errors import ModelError
from tersor.exporters.contract import PackedSite
from tersor.exporters.examples import Examples, outputs_of
from tersor.exporters.executorch.layers import Rounding, embedding, linear, quantized, weight
from tersor.exporters.tracing import plain_attention, slow_attention
from tersor.nn.packed import InputQuantizer, PackedEmbedding, PackedLinear, PackedWeight, packed_weight
from tersor.runtimes.executorch import quiet

LARGEST_BATCH, LARGEST_LENGTH = 32, 512  # rows, and tokens of a text


def trace(model: nn.Module, examples: Examples, sites: Iterable[PackedSite], rounding: Rounding) -> GraphModule:
    """The graph. Raises ModelError for a model that cannot be followed, or whose axes are not of any size."""
    with placeholders(model, sites, rounding), plain_attention(model), slow_attention(), quiet():
        program = exported(TracedForExecutorch(model, examples).eval(), model, examples)
        return program.run_decompositions({}).module(check_guards=False)


class TracedForExecutorch(nn.Module):
    """A model as a function of tensors in a fixed order."""

    def __init__(self, model: nn.Module, examples: Examples):
        super().__init__()
        self.model, self.examples = model, examples

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.examples.inputs, tensors, strict=True))
        return tuple(outputs_of(self.examples.call(self.model, inputs)).values())


def exported(callable: nn.Module, model: nn.Module, examples: Examples) -> Any:
    """A function of the examples' tensors as an ExportedProgram."""
    tensors = tuple(enlarged(examples, model).values())
    sizes = largest(model, examples)
    dims = {name: torch.export.Dim(name, min=1, max=size) for name, size in sizes.items()}
    shapes = tuple({i: dims[axis] for i, axis in examples.axes[name].items()} or None for name in examples.inputs)
    takes_each = isinstance(callable, GraphModule)  # where `Called` takes any number of tensors
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(
                callable, tensors, dynamic_shapes=shapes if takes_each else (shapes,), strict=False
            )
        except Exception as error:  # whatever the model trips over
            raise refused(error, model, examples) from error


def largest(model: nn.Module, examples: Examples) -> dict[str, int]:
    """The largest size of every axis that may have any."""
    config: Any = getattr(model, "config", None)
    length = min(getattr(config, "max_position_embeddings", None) or LARGEST_LENGTH, LARGEST_LENGTH)
    names = {axis for axes in examples.axes.values() for axis in axes.values()}
    return {name: LARGEST_BATCH if name == "batch" else length for name in sorted(names)}


def enlarged(examples: Examples, model: nn.Module) -> dict[str, Tensor]:
    """The examples, their rows repeated up to the largest batch: PyTorch chooses a convolution by the number of rows,
    and notes that the graph holds for such numbers only."""
    found = {}
    for name, tensor in examples.inputs.items():
        for axis, kind in examples.axes[name].items():
            if kind == "batch":
                rows = torch.arange(largest(model, examples)[kind]) % tensor.shape[axis]
                tensor = tensor.index_select(axis, rows)
        found[name] = tensor
    return found


@contextmanager
def placeholders(model: nn.Module, sites: Iterable[PackedSite], rounding: Rounding) -> Iterator[None]:
    """Context in which packed modules run as the operators of layers.py."""
    packed: dict[int, PackedSite] = {}
    for site in sites:
        place = site.site.owners[0]
        packed[id(packed_weight(model.get_submodule(place.module), place.parameter))] = site
    changed: list[tuple[nn.Module, str]] = []

    def put(module: nn.Module, function: Callable[..., Tensor]) -> None:
        module.forward = function
        changed.append((module, "forward"))

    try:
        for module in list(model.modules()):
            key = id(getattr(module, "packed", module))
            if key not in packed:
                continue
            site = packed[key]
            if isinstance(module, PackedLinear):
                put(module, linear(site, module.bias, rounding))
            elif isinstance(module, PackedEmbedding):
                put(module, embedding(site, rounding))
            elif isinstance(module, PackedWeight):
                put(module, weight(site, rounding))
            elif isinstance(quantizer := getattr(module, "input_quantizer", None), InputQuantizer):
                put(quantizer, quantized(site, rounding))
        yield
    finally:
        for module, attribute in changed:
            delattr(module, attribute)


def refused(error: Exception, model: nn.Module, examples: Examples) -> ModelError:
    """The error for a failed export: its cause, and the way out."""
    reason, what = " ".join(str(error).split()), type(model).__name__
    if static := STATIC.search(reason):
        axis = static["axis"]
        return ModelError(
            f"{what}: works for {axis} {static['size']} only, as far as torch.export sees; fix that axis with "
            f"--fixed {axis}"
        )
    return ModelError(f"{what}: torch.export cannot follow the model: {reason[:300]}; rewrite what it stumbles over")


STATIC = re.compile(r"marked (?P<axis>\w+) as dynamic but your code specialized it to be a constant \((?P<size>\d+)\)")


def axes_of(model: nn.Module, examples: Examples) -> Mapping[str, list[int | None]]:
    """The declared shape of each input: None where an axis has any size up to the largest."""
    return {
        name: [None if i in examples.axes[name] else size for i, size in enumerate(tensor.shape)]
        for name, tensor in examples.inputs.items()
    }
