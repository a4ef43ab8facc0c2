"""A model as an ONNX graph in which every packed weight is a single node of our own, to be written out later.

`torch.export` follows the model (with `torch.onnx`); where it meets a packed module, the graph gets a node of the
domain `tersor` that names the site and nothing else. lower.py then puts the site's codes and scales in its place, so
that no tool in between ever sees a weight, let alone rounds it.

    tersor::Linear(x, bias?)    x @ W.T + bias, the input quantized as the site says
    tersor::Embedding(index)    rows of W
    tersor::Weight()            W in its own shape (convolutions, LSTM, attention, stacked experts)
    tersor::Quantized(x)        x through the input quantizer of a convolution

Language models with a cache get more such nodes, of whole blocks: see blocks.py.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tersor.core.errors import InputError, ModelError
from tersor.exporters.contract import PackedSite
from tersor.exporters.examples import Examples, outputs_of
from tersor.exporters.onnx.blocks import DOMAIN, AttentionCaches, blocks, traced_call
from tersor.exporters.onnx.names import name_by_layer
from tersor.exporters.tracing import layer_of, plain_attention, slow_attention
from tersor.nn.packed import InputQuantizer, PackedEmbedding, PackedLinear, PackedWeight, packed_weight

OPSET = 21  # the first whose DequantizeLinear takes groups


def trace(model: nn.Module, examples: Examples, sites: Iterable[PackedSite]) -> ir.Model:
    """The graph, with its inputs, outputs and axes named, and every node after its layer.

    Raises:
        ModelError: an operator that ONNX does not have, with the layer; a model that cannot be followed, or whose
            axes are not of any size.
    """
    made = examples.run(model)
    names = list(examples.inputs)
    attention: AbstractContextManager[AttentionCaches | None] = (
        blocks(model) if examples.cached else plain_attention(model)
    )
    with quiet(), placeholders(model, sites), torch.no_grad(), slow_attention(), attention as caches:
        try:
            program: Any = torch.onnx.export(
                TracedForOnnx(model, examples, caches).eval(),
                tuple(examples.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=list(made),
                dynamic_shapes=(tuple(examples.axes[name] or None for name in names),),
                verbose=False,
            )
        except Exception as error:  # whatever the model, torch.export or the translation trips over
            raise refused(error, model, examples) from error
    check_axes(program.model.graph, examples)
    name_by_layer(program.model.graph)
    return program.model


def sites_in(model: ir.Model) -> frozenset[str]:
    """The sites that a traced graph names."""
    return frozenset(node.attributes["site"].as_string() for node in model.graph if "site" in node.attributes)


class TracedForOnnx(nn.Module):
    """A model as a function of tensors in a fixed order."""

    def __init__(self, model: nn.Module, examples: Examples, caches: AttentionCaches | None):
        super().__init__()
        self.model, self.examples, self.caches = model, examples, caches

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.examples.inputs, tensors, strict=True))
        if self.caches is not None:
            return tuple(traced_call(self.model, inputs, self.caches).values())
        return tuple(outputs_of(self.examples.call(self.model, inputs)).values())


@contextmanager
def placeholders(model: nn.Module, sites: Iterable[PackedSite]) -> Iterator[None]:
    """Inside this block packed modules leave a node in a trace instead of computing."""
    names: dict[int, str] = {}
    for packed in sites:
        place = packed.site.owners[0]
        names[id(packed_weight(model.get_submodule(place.module), place.parameter))] = packed.site.name
    changed: list[tuple[nn.Module, str]] = []

    def put(module: nn.Module, attribute: str, function: Callable[..., Tensor]) -> None:
        setattr(module, attribute, function)
        changed.append((module, attribute))

    try:
        for module in model.modules():
            name = names.get(id(getattr(module, "packed", None)), "")
            if isinstance(module, PackedLinear):
                put(module, "forward", linear_of(module, name))
            elif isinstance(module, PackedEmbedding):
                put(module, "forward", embedding_of(module, name))
            elif isinstance(module, PackedWeight) and id(module) in names:
                put(module, "forward", weight_of(module, names[id(module)]))
            if name and isinstance(getattr(module, "input_quantizer", None), InputQuantizer):
                put(module.input_quantizer, "forward", quantized_at(name))  # type: ignore[arg-type]
        yield
    finally:
        for module, attribute in changed:
            delattr(module, attribute)


def node(kind: str, site: str, inputs: Iterable[Tensor], dtype: torch.dtype, shape: Iterable[Any]) -> Tensor:
    """Emit one node of tersor's own operator set into the trace."""
    attributes: Any = {"site": site}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", tuple(inputs), attributes, dtype=dtype, shape=tuple(shape), version=1
    )


def linear_of(module: PackedLinear, site: str) -> Callable[[Tensor], Tensor]:
    """The forward of a packed linear layer in a trace."""

    def forward(x: Tensor) -> Tensor:
        inputs = [x] if module.bias is None else [x, module.bias]
        return node("Linear", site, inputs, x.dtype, (*x.shape[:-1], module.out_features))

    return forward


def embedding_of(module: PackedEmbedding, site: str) -> Callable[[Tensor], Tensor]:
    """The forward of a packed embedding in a trace."""

    def forward(index: Tensor) -> Tensor:
        return node("Embedding", site, [index], module.packed.dtype, (*index.shape, module.embedding_dim))

    return forward


def weight_of(packed: PackedWeight, site: str) -> Callable[[], Tensor]:
    """The decoding of a packed weight in a trace."""
    return lambda: node("Weight", site, [], packed.dtype, packed.fold.weight_shape)


def quantized_at(site: str) -> Callable[[Tensor], Tensor]:
    """The input quantizer of a convolution in a trace."""
    return lambda x: node("Quantized", site, [x], x.dtype, x.shape)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx warns of what is no concern of the user's, such as operators of packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def refused(error: Exception, model: nn.Module, examples: Examples) -> ModelError:
    """The error for a failed export: its cause, its layer, and the way out."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    ours = next((each for each in chain if isinstance(each, ModelError)), None)
    if ours is not None:
        return ours
    failed = next((found for each in chain if (found := TRANSLATING.search(str(each)))), None)
    what = type(model).__name__
    if failed:
        operator = failed["operator"]
        return ModelError(
            f"{what}: ONNX opset {OPSET} has no operator for {operator}, which {layer_of(operator, model, examples)} "
            f"calls; rewrite the layer with other operators, or leave it out of the exported model"
        )
    reason = " ".join(str(chain[-1]).split())[:300]
    static = STATIC.search(reason)
    if static:
        name = list(examples.inputs)[int(static["input"])]
        axis = examples.axes[name][int(static["axis"])]
        return ModelError(
            f"{what}: works for {axis} {static['size']} of {name} only, as far as torch.export sees; fix that axis "
            f"with --fixed {axis}"
        )
    return ModelError(f"{what}: torch.export cannot follow the model: {reason}; rewrite what it stumbles over")


TRANSLATING = re.compile(r"Error when translating node .*?target=(?:torch\.ops\.)?(?P<operator>[\w.]+)")
STATIC = re.compile(
    r"shape of (?P<size>\d+) for dimension inputs\['tensors'\]\[(?P<input>\d+)\]\.shape\[(?P<axis>\d+)\]"
)


def check_axes(graph: ir.Graph, examples: Examples) -> None:
    """Every axis that was declared of any size is, in the graph. Raises ModelError with the way out."""
    for value in graph.inputs:
        for position, axis in examples.axes.get(value.name or "", {}).items():
            size = value.shape[position] if value.shape is not None else None
            if isinstance(size, int):
                raise ModelError(
                    f"the model works for {axis} {size} of {value.name} only; fix that axis with --fixed {axis}"
                )
    missing = examples.inputs.keys() - {value.name for value in graph.inputs}
    if missing:
        raise InputError(f"the model does not use its input {', '.join(sorted(missing))}")
