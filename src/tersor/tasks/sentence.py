"""Sentence embeddings from hidden states, as a sentence-transformers folder describes them.

`modules.json` lists what follows the transformer: Pooling, Dense, LayerNorm, Normalize, each with its own folder of
configuration and weights. Without it `1_Pooling/config.json` is read, and without that the mean is taken. What is
judged is scaled to unit length in any case. Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from tersor.core.errors import InputError, ModelError
from tersor.core.modules_json import MODULES, listed, read_json
from tersor.core.weights_file import check_finite, read_weights

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "LeakyReLU", "ELU", "Softplus", "Hardtanh")
KNOWN = ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
Step = Callable[[Float[Tensor, "row dim"]], Float[Tensor, "row other"]]


@dataclass(frozen=True, eq=False)
class Embedder:
    """Turns hidden states `[text, position, dim]` into one vector per text.

    Attributes:
        pooling: one or several ways, whose vectors are concatenated.
        head: modules applied after pooling, in evaluation mode.
        names: the steps in words, for the report.
        max_length: tokens, where the folder says so.
        lower_case: True if texts are converted to lower case first.
    """

    pooling: tuple[str, ...] = ("mean",)
    head: tuple[nn.Module, ...] = ()
    names: tuple[str, ...] = ()
    max_length: int | None = None
    lower_case: bool = False

    @property
    def description(self) -> str:
        return ", ".join([f"{' + '.join(self.pooling)} pooling", *self.names])

    def __call__(
        self, hidden: Float[Tensor, "row position dim"], mask: Int[Tensor, "row position"]
    ) -> Float[Tensor, "row other"]:
        """One float32 vector of unit length per text, `[text, dim]`."""
        vectors = torch.cat([pool(hidden, mask, how) for how in self.pooling], -1)
        for module in self.head:
            vectors = module.to(vectors.device)(vectors)
        return normalize(vectors, dim=-1)


class Normalize(nn.Module):
    """A module that scales embeddings to unit length."""

    def forward(self, vectors: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        return normalize(vectors, dim=-1)


class Dense(nn.Module):
    """A linear layer and what follows it, perhaps beside its input."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Linear | None, use_residual: bool):
        super().__init__()
        self.linear, self.activation = linear, activation
        self.residual, self.use_residual = residual, use_residual

    def forward(self, vectors: Float[Tensor, "row dim"]) -> Float[Tensor, "row other"]:
        made = self.activation(self.linear(vectors))
        if not self.use_residual:
            return made
        return made + (vectors if self.residual is None else self.residual(vectors))


def pool(
    hidden: Float[Tensor, "row position dim"], mask: Int[Tensor, "row position"], how: str
) -> Float[Tensor, "row dim"]:
    """One float32 vector a text; padding (mask 0) takes no part, on whichever side it stands."""
    hidden = hidden.float()
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if how in ("mean", "mean_sqrt_len"):
        length = weights.sum(1)
        return (hidden * weights).sum(1) / (length if how == "mean" else length.sqrt())
    if how == "weightedmean":
        weights = weights * weights.cumsum(1)
        return (hidden * weights).sum(1) / weights.sum(1)
    if how == "max":
        return hidden.masked_fill(weights == 0, -torch.inf).max(1).values
    first = mask.argmax(1)
    place = first if how == "cls" else first + mask.sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def read_embedder(folder: Path | None) -> Embedder:
    """The `Embedder` that a model folder describes. Raises InputError for an unknown module, ModelError for damage."""
    if folder is None:
        return Embedder()
    folder = Path(folder)
    length, lower = read_limits(folder)
    modules = listed(folder)
    if not modules:
        return Embedder(read_pooling(folder / "1_Pooling"), max_length=length, lower_case=lower)
    pooling: tuple[str, ...] | None = None
    head: list[nn.Module] = []
    names: list[str] = []
    for kind, place in modules:
        if kind == "Transformer":
            continue
        if kind == "Pooling":
            pooling = read_pooling(folder / place)
            continue
        if kind not in KNOWN or pooling is None:
            raise InputError(
                f"{folder / MODULES}: {kind or 'a module without a type'} is not supported here; known after a "
                f"transformer: {', '.join(KNOWN)}, Pooling being the first of them"
            )
        if kind != "Dropout":
            module = {"Dense": read_dense, "LayerNorm": read_norm}.get(kind, lambda place: Normalize())(folder / place)
            head.append(module.eval().requires_grad_(False))
            names.append(kind if kind != "Dense" else f"Dense {module.linear.in_features}x{module.linear.out_features}")
    return Embedder(pooling or ("mean",), tuple(head), tuple(names), length, lower)


def read_pooling(place: Path) -> tuple[str, ...]:
    """The ways of pooling, from the module's `config.json`; the mean when there is none."""
    path = place / "config.json"
    if not path.is_file():
        return ("mean",)
    config = read_json(path, dict)
    given = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_") for key in config if key.startswith("pooling_mode_") and config[key] is True
    ]
    modes = [
        str(mode).removesuffix("_tokens").removesuffix("_token")
        for mode in ([given] if isinstance(given, str) else given)
    ]
    for mode in modes:
        if mode not in POOLINGS:
            raise InputError(f"{path}: pooling {mode} is not supported; known: {', '.join(POOLINGS)}")
    if not isinstance(config.get("pooling_mode"), list | tuple):
        modes.sort(key=POOLINGS.index)  # the order of the old style
    return tuple(modes) or ("mean",)


def read_dense(place: Path) -> Dense:
    """A Dense module and its weights."""
    config, state = read_json(place / "config.json", dict), read_state(place)
    name = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise InputError(f"{place}: activation {name} is not supported; known: {', '.join(ACTIVATIONS)}")
    ends = {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
    if ends != {"sentence_embedding"}:
        raise InputError(
            f"{place}: a Dense module of {' and '.join(sorted(ends))} is not supported; of sentences it is"
        )
    linear = linear_of(place, state, "linear")
    if linear is None:
        raise ModelError(f"{place}: its weights lack linear.weight; save the model again with save_pretrained")
    use_residual = bool(config.get("use_residual"))
    return Dense(linear, getattr(nn, name)(), linear_of(place, state, "residual"), use_residual)


def linear_of(place: Path, state: dict[str, Tensor], name: str) -> nn.Linear | None:
    """The linear layer of that name, float32; None where there is none."""
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if weight is None:
        return None
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ModelError(f"{place}: {name}.weight is {list(weight.shape)}; expected a matrix and a bias that fits it")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.float())
    if bias is not None:
        linear.bias = nn.Parameter(bias.float())
    return linear


def read_norm(place: Path) -> nn.Module:
    """A LayerNorm module and its weights."""
    state = read_state(place)
    weight, bias = state.get("norm.weight"), state.get("norm.bias")
    if weight is None or bias is None or weight.ndim != 1 or weight.shape != bias.shape:
        raise ModelError(f"{place}: its weights lack norm.weight and norm.bias of one size")
    norm = nn.LayerNorm(len(weight))
    norm.weight, norm.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    return norm


def read_state(place: Path) -> dict[str, Tensor]:
    """A module's tensors. Raises ModelError where there is no weights file, or a damaged one."""
    path, pickled = place / "model.safetensors", place / "pytorch_model.bin"
    path = pickled if pickled.is_file() and not path.is_file() else path
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file, and the model's embedding needs it; save the model again as safetensors"
        )
    state = read_weights(path)
    check_finite(state, str(path))
    return state


def read_limits(folder: Path) -> tuple[int | None, bool]:
    """The most tokens of a sentence, and if it is lowercased first (`sentence_bert_config.json`)."""
    path = folder / "sentence_bert_config.json"
    config = read_json(path, dict) if path.is_file() else {}
    length = config.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ModelError(f"{path}: max_seq_length is {length!r}; expected a whole number from 1")
    return length, config.get("do_lower_case") is True
