"""The connections of a transformer: a module and the linear layers that read its outputs, and nothing else does.

A factor can be moved from the outputs of such a module into the columns of its readers, and a feature can be taken out
of both.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tersor.nn.connections.families import BY_TYPE
from tersor.nn.parameters import matrix, parameter
from tersor.nn.sites import is_linear, is_plain


@dataclass(frozen=True)
class Connection:
    """A source in a model, and the linear layers that read it.

    Attributes:
        source: path of the module whose outputs can be scaled.
        readers: paths of the linear layers, which are their site names as well.
        num_features: how many features of the source are read.
        part: which run of `num_features` of the source's outputs that is.
        heads: how many heads the source has; each may serve several heads of the readers. 1 where there are none.
        norm_offset: what a norm adds to its stored gain.
    """

    source: str
    readers: tuple[str, ...]
    num_features: int
    part: int = 0
    heads: int = 1
    norm_offset: float = 0.0

    def spread(self, factor: Float[Tensor, " features"], num_columns: int) -> Float[Tensor, " columns"]:
        """The factor of each feature of the source, repeated for every column of a reader."""
        return factor.view(self.heads, 1, -1).expand(-1, num_columns // len(factor), -1).flatten()

    def largest(self, columns: Float[Tensor, " columns"]) -> Float[Tensor, " features"]:
        """The largest of the columns that read the same feature."""
        return columns.view(self.heads, len(columns) // self.num_features, -1).amax(1).flatten()


def find_connections(model: nn.Module) -> list[Connection]:
    """All connections of a model, in the order of its modules; none where the table does not know the model's type.

    Weights with a second user (tied, or of a reused layer) are left out.
    """
    modules = free_modules(model)
    return [each for path, config in configs(model) for each in connections_at(modules, path, config)]


def free_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The norms and linear layers whose parameters have no second user, by path."""
    users = Counter(map(id, (p for _, p in model.named_parameters(remove_duplicate=False))))
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and is_plain(module)
        and (is_linear(module) or parameter(module, "weight").dim() == 1)
        and all(users[id(p)] == 1 for p in module.parameters())
    }


def configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module's path, with the config of the nearest module around it that has one with a known `model_type`."""
    nearest: dict[str, Any] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        known = getattr(config, "model_type", None) is not None
        nearest[path] = config if known else nearest.get(path.rpartition(".")[0])
        if getattr(nearest[path], "model_type", None) in BY_TYPE:
            yield path, nearest[path]


def connections_at(modules: dict[str, nn.Module], path: str, config: Any) -> Iterator[Connection]:
    """The connections whose source is the module at `path`."""
    family = BY_TYPE[config.model_type]
    for row in family.rows:
        prefix = ("." + path).removesuffix("." + row.source)
        if prefix == "." + path or any(getattr(config, key, None) != value for key, value in row.when):
            continue
        readers = tuple(f"{prefix}.{reader}".lstrip(".") for reader in row.readers)
        if all(name in modules for name in (path, *readers)):
            num_features = num_outputs(modules[path]) // row.part[1]
            heads = getattr(config, row.heads) if row.heads else 1
            yield Connection(path, readers, num_features, row.part[0], heads, family.norm_offset)


def num_outputs(module: nn.Module) -> int:
    """The number of features that a norm or a linear layer gives."""
    return matrix(module).shape[0] if is_linear(module) else len(parameter(module, "weight"))
