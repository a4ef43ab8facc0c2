"""The blocks of a language model as single nodes of a trace: attention with its cache, rotary positions, RMS norms.

Runtimes have kernels for each, which a graph of small operators would not reach. What the nodes stand for:

    tersor::Attention(query, key, value, past_key, past_value, bias, sinks?) to (rows, present_key, present_value)
        softmax(query @ keys.T * scale + bias) @ values over what was kept and what is new, heads side by side in rows;
        as many queries share a key as there are more of them (https://arxiv.org/abs/2305.13245); a head's sink is one
        more number in its softmax, which counts for nothing else
    tersor::Rotary(x, cos, sin)  x * cos + rotate_half(x) * sin (https://arxiv.org/abs/2104.09864)
    tersor::RmsNorm(x, weight)   x / sqrt(mean(x * x) + epsilon) * weight (https://arxiv.org/abs/1910.07467)

Whether a model's own functions compute this is tried on random numbers first; where they do not, they are followed.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.exporters.decoder import NEW, PAST, PRESENT
from tersor.nn.cached_call import call_with_cache

DOMAIN = "tersor"
NAME = "tersor"  # of our attention in transformers' tables


@dataclass
class AttentionCaches:
    """The cache that the layers of a trace share: the past they are given, and the present they give."""

    past: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)


def traced_call(model: nn.Module, inputs: Mapping[str, Tensor], caches: AttentionCaches) -> dict[str, Tensor]:
    """`call_cached` inside `blocks`: the cache only counts, and every attention node takes and gives its own part."""
    caches.past, caches.present = {name: tensor for name, tensor in inputs.items() if name.startswith(PAST)}, {}
    num_new = inputs["input_ids"].shape[1]
    cache = counting_cache(inputs["attention_mask"].shape[1] - num_new)
    logits, _ = call_with_cache(model, cache, **{name: inputs[name] for name in NEW})
    missing = len(caches.past) - len(caches.present)
    if missing:
        raise ModelError(
            f"{type(model).__name__}: {missing // 2} layers keep no keys and values of their own; "
            f"export it without a cache: --no-cache"
        )
    names = [name.replace(PAST, PRESENT, 1) for name in caches.past]
    return {"logits": logits, **{name: caches.present[name] for name in names}}


def counting_cache(num_past: Any) -> Any:
    """A cache of known length that stores nothing: `update` returns the new keys and values as they are."""
    from transformers import DynamicCache

    class Counting(DynamicCache):
        """A cache that only knows its length."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return num_past

        def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
            return query_length + num_past, 0

    return Counting()


@contextmanager
def blocks(model: nn.Module) -> Iterator[AttentionCaches]:
    """Context in which a traced model emits attention, rotary and norm nodes as single operators."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    caches = AttentionCaches()
    AttentionInterface.register(NAME, partial(attention, caches))
    AttentionMaskInterface.register(NAME, eager_mask)
    config: Any = model.config
    wanted = {"_attn_implementation": NAME, "_experts_implementation": "batched_mm"}
    before = {name: getattr(config, name) for name in wanted if getattr(config, name, None) is not None}
    for name in before:
        setattr(config, name, wanted[name])
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        epsilon = epsilon_of(module)
        if epsilon is not None:
            module.forward = norm_of(module, epsilon)
            changed.append((module, "forward", None))
        code = sys.modules[type(module).__module__]
        rotate = getattr(code, ROTARY, None)
        if rotate is not None and rotate is not rotary and rotates_halves(rotate):
            setattr(code, ROTARY, rotary)
            changed.append((code, ROTARY, rotate))
    try:
        yield caches
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for owner, name, value in changed:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def attention(
    caches: AttentionCaches,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query `[batch, heads, new, size]`, keys and values with fewer heads."""
    number = module.layer_idx
    past_key, past_value = (caches.past[f"{PAST}.{number}.{kind}"] for kind in ("key", "value"))
    batch, num_heads, num_new, size = query.shape
    total = attention_mask.shape[-1]
    rows = (batch, num_new, num_heads * value.shape[-1])
    present = [(batch, each.shape[1], total, each.shape[-1]) for each in (key, value)]
    attributes: dict[str, Any] = {
        "scale": float(size**-0.5 if scaling is None else scaling),
        "softcap": float(softcap or 0.0),
        "num_heads": num_heads,
        "kv_num_heads": key.shape[1],
    }
    made = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Attention",
        (query, key, value, past_key, past_value, attention_mask, *([] if s_aux is None else [s_aux])),
        attributes,
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=(rows, *present),
        version=1,
    )
    caches.present[f"{PRESENT}.{number}.key"], caches.present[f"{PRESENT}.{number}.value"] = made[1], made[2]
    return made[0].view(batch, num_new, num_heads, -1), None


ROTARY = "apply_rotary_pos_emb"  # the function of transformers' modeling files


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Both `[batch, heads, token, size]`; cos and sin `[batch, token, size]`."""
    made = [
        torch.onnx.ops.symbolic(f"{DOMAIN}::Rotary", (x, cos, sin), {}, dtype=x.dtype, shape=tuple(x.shape), version=1)
        for x in (q, k)
    ]
    return made[0], made[1]


def rotates_halves(function: Callable[..., Any]) -> bool:
    """True if a model's rotary function is `x * cos + rotate_half(x) * sin`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator)
    cos, sin = (torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2) for _ in range(2))
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    try:
        made = function(x, x, cos, sin)
    except Exception:  # another signature: another function
        return False
    expected = x * cos[:, None] + turned * sin[:, None]
    return all(isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, atol=1e-5) for y in made)


STATIC = {"default", "linear", "llama3", "yarn"}  # rotary embeddings whose angles depend on the position alone


def rotary_tables(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines `[position, size / 2]` of all positions that the model was made for; None where its angles
    depend on more, or differ between layers, and for heads whose size is no multiple of 16, as ONNX Runtime wants."""
    makers = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    kind = getattr(makers[0], "rope_type", None) if len(makers) == 1 else None  # a dict where layers differ
    if not length or not isinstance(kind, str) or kind not in STATIC:
        return None
    try:
        with torch.no_grad():
            cos, sin = makers[0](torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    except Exception:  # another signature: another module
        return None
    half = cos.shape[-1] // 2
    if half % 8:
        return None
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def epsilon_of(module: nn.Module) -> float | None:
    """The epsilon of an RMS norm over the last axis; None for any other module."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1
    if not plain or not isinstance(epsilon, float) or getattr(module, "bias", None) is not None:
        return None
    assert isinstance(weight, Tensor)
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        made, wide = module(x), x.float()
        expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()
    room = 4 * torch.finfo(weight.dtype).eps
    return epsilon if torch.allclose(made.float(), expected, rtol=room, atol=room) else None


def norm_of(module: nn.Module, epsilon: float) -> Callable[[Tensor], Tensor]:
    """The forward of an RMS norm in a trace."""

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        attributes: dict[str, Any] = {"epsilon": epsilon}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::RmsNorm", (x, weight), attributes, dtype=x.dtype, shape=tuple(x.shape), version=1
        )

    return forward
