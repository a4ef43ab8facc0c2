"""The table of names that differ between transformer architectures: blocks, projections and sizes.

Names of the configuration's fields, and of the attention's projections inside a block. Where queries, keys and values
are one matrix, these have no names here: such a model can lose layers, but not width.
"""

from dataclasses import dataclass, replace

from torch import nn

from tersor.core.errors import InputError, UnknownName


@dataclass(frozen=True)
class Attention:
    """Names inside a block of the linear layers around the heads."""

    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True)
class Architecture:
    """Names of a configuration's sizes.

    Attributes:
        num_kv_heads, head_dim: "" where the configuration has no such field: as many as heads, and hidden / heads.
        rotary: whether positions turn pairs of a head's dimensions, so that none of them can be taken out.
    """

    num_layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    num_heads: str = "num_attention_heads"
    intermediate: str = "intermediate_size"
    num_kv_heads: str = ""
    head_dim: str = ""
    rotary: bool = False
    attention: Attention | None = None


BERT = Architecture(
    attention=Attention("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
)
VIT = Architecture(
    attention=Attention("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
)
LLAMA = Architecture(
    num_kv_heads="num_key_value_heads",
    head_dim="head_dim",
    rotary=True,
    attention=Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)
DISTILBERT = Architecture(
    num_layers="n_layers",
    hidden="dim",
    num_heads="n_heads",
    intermediate="hidden_dim",
    attention=Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
)
GPT2 = Architecture(num_layers="n_layer", hidden="n_embd", num_heads="n_head", intermediate="n_inner")

ARCHITECTURES: dict[str, Architecture] = {  # by config.model_type
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "distilbert": DISTILBERT,
    "mpnet": replace(
        BERT, attention=Attention("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o")
    ),
    "vit": VIT,
    "deit": VIT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
PER_LAYER = ("layer_types", "no_rope_layers")  # fields of a configuration that hold one entry a layer


def architecture_of(model: nn.Module, what: str) -> Architecture:
    """The row of a Hugging Face model. Raises InputError for other models, UnknownName for a type without a row."""
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(f"{what} knows Hugging Face models, and {type(model).__name__} is none")
    if config.model_type not in ARCHITECTURES:
        raise UnknownName(f"model type for {what}", config.model_type, ARCHITECTURES)
    return ARCHITECTURES[config.model_type]


def attention_of(model: nn.Module, what: str) -> Attention:
    """The names of a model's attention projections. Raises InputError where queries, keys and values are one matrix."""
    attention = architecture_of(model, what).attention
    if attention is None:
        raise InputError(
            f"{what}: {type(model).__name__} keeps queries, keys and values in one matrix, which is not split"
        )
    return attention
