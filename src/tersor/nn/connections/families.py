"""The table of transformers that are wired alike: which module feeds which linear layers, by `config.model_type`.

The norms of post-norm models (BERT) also feed the residual stream, so the table has only the attention values there.
"""

from typing import Any, NamedTuple


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
