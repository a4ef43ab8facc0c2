"""A traced model as a `.pte` file: what XNNPACK has kernels for is handed to it, the rest runs on ExecuTorch's own
operators, one at a time. The file says the names and shapes of inputs and outputs itself, as a method of its own."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from tersor.core.errors import ArtifactError, MissingExtra, ModelError
from tersor.exporters.examples import Examples
from tersor.exporters.executorch.trace import axes_of, exported, largest
from tersor.exporters.tracing import layer_of
from tersor.runtimes.executorch import SIGNATURE, library, quiet


@dataclass(frozen=True)
class Placement:
    """Counts of a file's operators by where they run.

    Attributes:
        num_inside: operators that XNNPACK runs.
        outside: how often each of ExecuTorch's own operators runs, by name.
        num_parts: pieces of the graph that XNNPACK was handed.
    """

    num_inside: int
    outside: dict[str, int]
    num_parts: int

    def describe(self) -> str:
        """A sentence about the program for the user: which operators run where."""
        total = sum(self.outside.values())
        names = ", ".join(f"{name} x{number}" for name, number in sorted(self.outside.items()))
        parts = f"{self.num_inside} operators in XNNPACK, in {self.num_parts} part{'s' * (self.num_parts != 1)}"
        return f"{parts}; {total} outside it" + (f": {names}" if names else "")


def save(traced: GraphModule, model: nn.Module, examples: Examples, path: Path) -> Placement:
    """Write the file. Raises ModelError for an operator that ExecuTorch does not have, with the layer."""
    partitioner, to_edge = lowering()
    signature = {
        "inputs": [{"name": n, "shape": shape} for n, shape in axes_of(model, examples).items()],
        "outputs": list(examples.run(model)),
        "largest": largest(model, examples),
    }
    program = exported(traced, model, examples)
    with quiet(), torch.no_grad():
        try:
            edge = to_edge(program, partitioner=[partitioner()], constant_methods={SIGNATURE: json.dumps(signature)})
            placed = placement(edge.exported_program(), model, examples)
            made = edge.to_executorch()
        except ModelError:
            raise
        except Exception as error:  # of many kinds
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{type(model).__name__}: ExecuTorch cannot take the model: {reason}") from error
    try:
        with path.open("wb") as file:
            made.write_to_file(file)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error}") from None
    return placed


def placement(program: Any, model: nn.Module, examples: Examples) -> Placement:
    """Counts the operators. Raises ModelError for one that the runtime does not have."""
    outside: Counter[str] = Counter()
    num_inside = num_parts = 0
    for node in program.graph.nodes:
        if node.op == "get_attr" and hasattr(part := getattr(program.graph_module, node.target), "original_module"):
            nodes = part.original_module.graph.nodes
            num_inside += sum(each.op == "call_function" and "quantize" not in str(each.target) for each in nodes)
            num_parts += 1
        elif node.op == "call_function" and (name := operator_name(node.target)):
            outside[name.split("::")[1]] += 1
            if name.startswith("quantized"):
                raise ModelError(
                    f"{type(model).__name__}: XNNPACK does not take one of the int8 layers ({name} is left); leave it "
                    f"float with --rule 'NAME=keep', or write decoded weights by --decode"
                )
            if not available(name):
                where = layer_of(name.replace("::", "."), model, examples)
                raise ModelError(
                    f"{type(model).__name__}: ExecuTorch has no operator for {name}, which {where} calls; rewrite the "
                    f"layer with other operators, or leave it out of the exported model"
                )
    return Placement(num_inside, dict(outside), num_parts)


def operator_name(target: Any) -> str:
    """`aten::add` of an operator; empty for what is none, such as a number of rows that is asked for."""
    schema = getattr(getattr(target, "_op", target), "_schema", None)
    name = "" if schema is None else schema.name
    return "" if "sym_size" in name else name


def available(name: str) -> bool:
    """True if the runtime has an operator, in any of its variants."""
    return any(each.split(".")[0] == name for each in library()._get_operator_names())


def lowering() -> tuple[Any, Any]:
    """XNNPACK's partitioner, and the function that applies it."""
    with quiet():
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
        except ImportError:
            raise MissingExtra("executorch", "writing ExecuTorch files") from None
    return XnnpackPartitioner, to_edge_transform_and_lower
