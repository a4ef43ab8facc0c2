"""Small models of every kind that owns weights, with inputs: what tests of sites, artifacts and budgets run over."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tersor.nn.sites import find_sites


@dataclass(frozen=True)
class Case:
    """A model and what it is run on.

    Attributes:
        build: makes the model; random weights.
        inputs: keyword or positional arguments of its forward.
        exact: whether the packed model runs the very operations of the float model; else they differ in rounding.
        prompt: what `generate` starts from, where the model has it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any] | tuple[Any, ...]]
    exact: bool = True
    prompt: str | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no zero biases, no unit norms
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def run(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return outputs(model, self.arguments(model))

    def arguments(self, model: nn.Module) -> Any:
        """The inputs, floats in the dtype of the model's kept parameters."""
        torch.manual_seed(2)
        dtype = next(model.parameters()).dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        inputs = self.inputs()
        if isinstance(inputs, dict):
            return {name: cast(value) for name, value in inputs.items()}
        return tuple(cast(value) for value in inputs)

    def generate(self, model: nn.Module) -> Tensor:
        """A few tokens, greedily."""
        prompt = {name: value for name, value in self.arguments(model).items() if name == self.prompt}
        attention = torch.ones_like(prompt["input_ids"])
        return model.generate(**prompt, attention_mask=attention, max_new_tokens=4, do_sample=False)  # type: ignore


def outputs(model: nn.Module, arguments: Any) -> list[Tensor]:
    return flat(model(**arguments) if isinstance(arguments, dict) else model(*arguments))


def flat(made: Any) -> list[Tensor]:
    """All tensors of an output, caches left out."""
    if isinstance(made, Tensor):
        return [made]
    if isinstance(made, transformers.utils.ModelOutput):
        made = [value for name, value in made.items() if name not in ("past_key_values", "cache_params")]
    return [tensor for value in made for tensor in flat(value)] if isinstance(made, list | tuple) else []


class Experts(nn.Module):
    """A stack of expert matrices as one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 16, 20))
        self.gain = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.weights, x) * self.gain


class TiedHead(nn.Module):
    """A language model whose embedding is its output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(index)).tanh())


class TiedInside(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.there = nn.Parameter(torch.randn(2, 16, 16))
        self.back = self.there
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.there[0] @ self.back[1].t() + self.bias


class SharedLayer(nn.Module):
    """One module at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x).relu())


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * 3


class Cell(nn.Module):
    def __init__(self, cell: nn.RNNCellBase):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x)
        return state[0] + state[1] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)
        self.norm = nn.LayerNorm(16)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.norm(self.attention(query, key, value, need_weights=False)[0])


class Encoder(nn.Module):
    """PyTorch's encoder, with padding, so that its fused path for nested tensors would run."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)[:, :3]


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, (3, 2), stride=2, dilation=(1, 2), padding_mode="reflect", padding=1),
        nn.Conv2d(6, 6, 3, padding="same", groups=6, bias=False),
    )


def indices(*shape: int, high: int = 40) -> Tensor:
    return torch.randint(3, high, shape)


PLAIN = {
    "linear": Case(
        lambda: nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)),
        lambda: (torch.randn(2, 3, 10),),
    ),
    "conv1d": Case(
        lambda: nn.Sequential(nn.Conv1d(4, 6, 5, groups=2, padding=2, padding_mode="replicate"), nn.Conv1d(6, 3, 1)),
        lambda: (torch.randn(2, 4, 11),),
    ),
    "conv2d": Case(conv_net, lambda: (torch.randn(2, 4, 9, 8),)),
    "conv3d": Case(
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular")),
        lambda: (torch.randn(1, 2, 4, 5, 3),),
    ),
    "conv transposed": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.ReLU()),
        lambda: (torch.randn(2, 4, 5, 5),),
    ),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(50, 12, padding_idx=3), nn.LayerNorm(12)), lambda: (indices(2, 5),)
    ),
    "embedding max_norm": Case(
        lambda: nn.Sequential(nn.Embedding(50, 12, max_norm=1.5), nn.LayerNorm(12)), lambda: (indices(2, 5),)
    ),
    "embedding bag": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(50, 12, mode="mean"), nn.LayerNorm(12)), lambda: (indices(2, 5),)
    ),
    "lstm": Case(
        lambda: nn.LSTM(6, 10, num_layers=2, bidirectional=True, proj_size=4, batch_first=True),
        lambda: (torch.randn(2, 5, 6),),
    ),
    "gru": Case(lambda: nn.GRU(6, 10, num_layers=2, bidirectional=True), lambda: (torch.randn(5, 2, 6),)),
    "rnn": Case(lambda: nn.Sequential(nn.RNN(6, 10)), lambda: (torch.randn(5, 2, 6),)),
    "lstm cell": Case(lambda: Cell(nn.LSTMCell(6, 10)), lambda: (torch.randn(3, 6),)),
    "gru cell": Case(lambda: Cell(nn.GRUCell(6, 10)), lambda: (torch.randn(3, 6),)),
    "attention": Case(Attention, lambda: (torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16))),
    "attention apart": Case(
        lambda: Attention(kdim=10, vdim=12),
        lambda: (torch.randn(2, 3, 16), torch.randn(2, 5, 10), torch.randn(2, 5, 12)),
    ),
    "self attention": Case(Attention, lambda: (torch.ones(2, 3, 16).cumsum(1),) * 3),
    "encoder": Case(
        Encoder, lambda: (torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([[6], [4], [3]])), exact=False
    ),
    "encoder decoder": Case(
        lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 3, 16)),
    ),
    "experts": Case(Experts, lambda: (torch.randn(2, 20),)),
    "tied head": Case(TiedHead, lambda: (indices(2, 5),)),
    "tied inside": Case(TiedInside, lambda: (torch.randn(2, 16),)),
    "shared layer": Case(SharedLayer, lambda: (torch.randn(2, 8),)),
    "own linear": Case(lambda: nn.Sequential(DoubledLinear(9, 5)), lambda: (torch.randn(2, 9),)),
    "own embedding": Case(lambda: nn.Sequential(ScaledEmbedding(50, 12), nn.LayerNorm(12)), lambda: (indices(2, 5),)),
}


def pretrained(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A random Hugging Face model, e.g. `pretrained("LlamaForCausalLM", ...)`."""

    def build() -> nn.Module:
        model_class = getattr(transformers, kind)
        return model_class(model_class.config_class(architectures=[kind], **options))

    return build


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**SIZES, **SPECIAL, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64}


def tokens() -> dict[str, Any]:
    return {"input_ids": indices(2, 6, high=60)}


PRETRAINED = {
    "gpt2": Case(
        pretrained("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **SPECIAL),
        tokens,
        prompt="input_ids",
    ),
    "llama": Case(pretrained("LlamaForCausalLM", tie_word_embeddings=True, **GQA), tokens, prompt="input_ids"),
    "mixtral": Case(pretrained("MixtralForCausalLM", num_local_experts=4, **GQA), tokens, prompt="input_ids"),
    "qwen2 moe": Case(
        pretrained(
            "Qwen2MoeForCausalLM",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=32,
            **GQA,
        ),
        tokens,
        prompt="input_ids",
    ),
    "opt": Case(
        pretrained(
            "OPTForCausalLM",
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            init_std=0.2,
            **SPECIAL,
        ),
        tokens,
        prompt="input_ids",
    ),
    "mamba": Case(
        pretrained("MambaForCausalLM", hidden_size=32, state_size=4, num_hidden_layers=2, **SPECIAL),
        tokens,
        prompt="input_ids",
    ),
    "t5": Case(
        pretrained(
            "T5ForConditionalGeneration",
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        lambda: {**tokens(), "decoder_input_ids": indices(2, 4, high=60)},
        prompt="input_ids",
    ),
    "whisper": Case(
        pretrained(
            "WhisperForConditionalGeneration",
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=24,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SPECIAL,
        ),
        lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": indices(2, 4, high=60)},
    ),
    "bert": Case(
        pretrained("BertForSequenceClassification", vocab_size=64, max_position_embeddings=32, **SIZES),
        lambda: {**tokens(), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])},
    ),
    "clip vision": Case(
        pretrained("CLIPVisionModel", image_size=16, patch_size=4, **SIZES),
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    ),
}
ZOO = {**PLAIN, **PRETRAINED}


@cache
def original(name: str) -> nn.Module:
    """The model of a case, built once; nobody may change it."""
    return ZOO[name].model()


def with_schemes(schemes: list[str]) -> list[Any]:
    """Every model with every scheme, for `parametrize`; every second pair only in the slow run."""
    pairs = [(i + j, name, scheme) for i, name in enumerate(ZOO) for j, scheme in enumerate(schemes)]
    return [pytest.param(name, scheme, marks=pytest.mark.slow if odd % 2 else ()) for odd, name, scheme in pairs]


def decoded(model: nn.Module, packed: nn.Module) -> nn.Module:
    """A copy of the float `model` whose weights are those that `packed` decodes.

    They need no gradient, as decoded weights do not: PyTorch chooses between matrix products by that.
    """
    reference = copy.deepcopy(model).requires_grad_(False)
    for site in find_sites(reference):
        site.weight(reference).copy_(site.weight(packed))
    return reference
