"""The calls of a model's forward as a graph, from a torch.fx trace: which layer's output a layer reads."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch.fx
from torch import nn

from tersor.core.errors import ModelError
from tersor.nn.sites import is_plain

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Graph:
    """The modules that a forward calls.

    Attributes:
        calls: the node of each module's call, by path. Modules called twice, or whose parameters something else uses,
            or that hooks or a forward of their own make something else, are left out.
    """

    model: nn.Module
    calls: dict[str, torch.fx.Node]

    @classmethod
    def of(cls, model: nn.Module, transform: str) -> "Graph":
        """The graph of a model. Raises ModelError where torch.fx cannot follow its forward."""
        try:
            nodes = list(torch.fx.Tracer().trace(model).nodes)
        except Exception as problem:  # whatever the model's own code raises when it is given a proxy
            first_line = str(problem).partition("\n")[0]
            raise ModelError(
                f"{transform}: torch.fx cannot trace {type(model).__name__} ({first_line}); leave {transform} out"
            ) from None
        called = [(str(node.target), node) for node in nodes if node.op == "call_module"]
        num_calls = Counter(path for path, _ in called)
        read = [str(node.target) for node in nodes if node.op == "get_attr"]
        users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        return cls(
            model,
            {
                path: node
                for path, node in called
                if num_calls[path] == 1
                and is_plain(model.get_submodule(path))
                and not any(name.startswith(path + ".") for name in read)
                and all(users[id(p)] == 1 for p in model.get_submodule(path).parameters())
            },
        )

    def source(self, path: str, through: Callable[[torch.fx.Node], bool] = lambda node: False) -> str | None:
        """The module whose output reaches the one at `path` through nothing but nodes that `through` lets pass, each
        of them read by no other; None if there is none."""
        node = self.calls[path]
        while len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            if len(node.users) != 1:
                return None
            if not through(node):
                return str(node.target) if str(node.target) in self.calls and node.op == "call_module" else None
        return None

    def module(self, node: torch.fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one that nothing else uses."""
        path = str(node.target)
        return self.model.get_submodule(path) if node.op == "call_module" and path in self.calls else None


def is_batch_norm(module: nn.Module) -> bool:
    """True if a module is a batch norm with statistics and a gain of its own."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return type(module) in kinds and module.running_mean is not None and module.weight is not None
