"""Which module of a transformer feeds which linear layers: the table `FAMILIES`, by `config.model_type`.

Where a norm or a linear layer is read by linear layers only, a factor can be moved from its outputs into their columns.
The norms of post-norm models (BERT) also feed the residual stream, so there only the attention values can be scaled.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.methods.stats import Stats
from tersor.nn.sites import is_linear, is_plain, is_transposed_linear


class Feed(NamedTuple):
    """A source and the linear layers that read it, in one block.

    Attributes:
        source: a norm, or a linear layer whose outputs reach the readers times something that does not depend on them.
        readers: the linear layers that read it; nothing else does.
        part: which of how many equal parts of the source's outputs are read.
        heads: for attention values, which key of the config counts their heads.
        when: what the config must say for this to hold.
    """

    source: str
    readers: tuple[str, ...]
    part: tuple[int, int] = (0, 1)
    heads: str | None = None
    when: tuple[tuple[str, Any], ...] = ()


class Family(NamedTuple):
    """Model types that are wired alike.

    Attributes:
        rows: what feeds what.
        norm_offset: what the norms add to their stored gain.
        writers: the linear layers whose outputs are added to the residual stream, where a rotation of it can be fused.
    """

    model_types: tuple[str, ...]
    rows: tuple[Feed, ...]
    norm_offset: float = 0.0
    writers: tuple[str, ...] = ()


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (
    Feed("input_layernorm", QKV),
    Feed("self_attn.v_proj", ("self_attn.o_proj",), heads="num_key_value_heads"),
)
UP_DOWN = Feed("mlp.up_proj", ("mlp.down_proj",))
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
LLAMA = (*ATTENTION, Feed("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")), UP_DOWN)
GEMMA2 = (*ATTENTION, Feed("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")), UP_DOWN)
HEADS = "num_attention_heads"
PRE_NORM = (("do_layer_norm_before", True),)

FAMILIES = [
    Family(("llama", "mistral", "qwen2", "qwen3", "smollm3"), LLAMA, writers=WRITERS),
    Family(("gemma",), LLAMA, norm_offset=1.0, writers=WRITERS),
    Family(("gemma2", "gemma3_text"), GEMMA2, norm_offset=1.0),
    Family(("mixtral", "qwen2_moe", "qwen3_moe"), ATTENTION),
    Family(
        ("phi3",),
        (
            Feed("input_layernorm", ("self_attn.qkv_proj",)),
            Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Feed("mlp.gate_up_proj", ("mlp.down_proj",), part=(1, 2)),
        ),
    ),
    Family(
        ("gpt2",),
        (
            Feed("ln_1", ("attn.c_attn",)),
            Feed("ln_2", ("mlp.c_fc",)),
            Feed("attn.c_attn", ("attn.c_proj",), part=(2, 3), heads=HEADS),
        ),
    ),
    Family(
        ("opt",),
        (
            Feed("self_attn_layer_norm", QKV, when=PRE_NORM),
            Feed("final_layer_norm", ("fc1",), when=PRE_NORM),
            Feed("self_attn.v_proj", ("self_attn.out_proj",), heads=HEADS),
            Feed("fc1", ("fc2",), when=(("activation_function", "relu"),)),
        ),
    ),
    Family(
        ("bert", "roberta", "electra"),
        (Feed("attention.self.value", ("attention.output.dense",), heads=HEADS),),
    ),
    Family(("distilbert",), (Feed("attention.v_lin", ("attention.out_lin",), heads=HEADS),)),
]


BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


@dataclass(frozen=True)
class Pair:
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

    def scale(self, model: nn.Module, factor: Float[Tensor, " features"]) -> None:
        """Divide the source's outputs by `factor`, multiply the readers' columns with it."""
        source = model.get_submodule(self.source)
        factor = self.divide_rows(source, factor) if is_linear(source) else self.divide_norm(source, factor)
        for reader in map(model.get_submodule, self.readers):
            weight = matrix(reader)
            set_matrix(reader, weight * self.spread(factor, weight.shape[1]))

    def divide_rows(self, linear: nn.Module, factor: Tensor) -> Tensor:
        """Divide the outputs of a linear layer that are read; returns `factor`."""
        weight, first = matrix(linear).clone(), self.part * len(factor)
        weight[first : first + len(factor)] /= factor.unsqueeze(1)
        set_matrix(linear, weight)
        if linear.bias is not None:
            bias = parameter(linear, "bias").clone()
            bias[first : first + len(factor)] /= factor
            set_parameter(linear, "bias", bias)
        return factor

    def divide_norm(self, norm: nn.Module, factor: Tensor) -> Tensor:
        """Divide a norm's outputs; returns the factor as the norm's rounded gain has it."""
        gain = parameter(norm, "weight").double() + self.norm_offset
        set_parameter(norm, "weight", gain / factor - self.norm_offset)
        new_gain = parameter(norm, "weight").double() + self.norm_offset
        factor = torch.where(new_gain == 0, factor.double(), gain / new_gain)
        if getattr(norm, "bias", None) is not None:
            set_parameter(norm, "bias", parameter(norm, "bias") / factor)
        return factor


def find_pairs(model: nn.Module) -> list[Pair]:
    """All pairs of a model, in the order of its modules; none where the table does not know the model's type.

    Weights with a second user (tied, or of a reused layer) are left out.
    """
    modules = free_modules(model)
    return [pair for path, config in configs(model) for pair in pairs_at(modules, path, config)]


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


def pairs_at(modules: dict[str, nn.Module], path: str, config: Any) -> Iterator[Pair]:
    """The pairs whose source is the module at `path`."""
    family = BY_TYPE[config.model_type]
    for row in family.rows:
        prefix = ("." + path).removesuffix("." + row.source)
        if prefix == "." + path or any(getattr(config, key, None) != value for key, value in row.when):
            continue
        readers = tuple(f"{prefix}.{reader}".lstrip(".") for reader in row.readers)
        if all(name in modules for name in (path, *readers)):
            num_features = num_outputs(modules[path]) // row.part[1]
            heads = getattr(config, row.heads) if row.heads else 1
            yield Pair(path, readers, num_features, row.part[0], heads, family.norm_offset)


def num_outputs(module: nn.Module) -> int:
    """The number of features that a norm or a linear layer gives."""
    return matrix(module).shape[0] if is_linear(module) else len(parameter(module, "weight"))


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter's values."""
    return module.get_parameter(name).detach()


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one of its own type; the old one, which another model may use, is left alone."""
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))


def matrix(linear: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear layer."""
    weight = parameter(linear, "weight")
    return weight.t() if is_transposed_linear(linear) else weight


def set_matrix(linear: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Replace the weight of a linear layer."""
    set_parameter(linear, "weight", weight.t() if is_transposed_linear(linear) else weight)


def require_pairs(model: nn.Module, transform: str) -> list[Pair]:
    """All pairs of a model. Raises ModelError if there are none."""
    pairs = find_pairs(model)
    if not pairs:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ModelError(
            f"{transform}: {type(model).__name__} (model type {model_type}) has no layers whose inputs can be scaled; "
            f"known model types: {', '.join(sorted(BY_TYPE))}"
        )
    return pairs


def stats_of(pair: Pair, stats: Mapping[str, Stats]) -> Stats:
    """Statistics of the input that the readers of a pair share."""
    return next((stats[path] for path in pair.readers if path in stats), Stats())
