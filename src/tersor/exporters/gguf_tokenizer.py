"""A Hugging Face tokenizer as GGUF metadata: byte-level BPE, whose way to split text GGUF knows by a name."""

import json
from pathlib import Path
from typing import Any

from tersor.core.errors import ModelError
from tersor.core.messages import first_line

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS % "{1,3}": "llama-bpe", WORDS % "": "qwen2"}


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys, with one token for each of the model's `vocab_size` embeddings.

    Raises ModelError for a tokenizer that GGUF has no name for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        description = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever a missing or damaged file trips over
        raise ModelError(
            f"{folder}: gguf needs the tokenizer, which cannot be read ({first_line(error)}); "
            "put the original model's tokenizer files there"
        ) from None
    pre = pre_tokenizer(description)
    if description["model"]["type"] != "BPE" or pre is None:
        raise ModelError(
            f"{folder}: gguf export knows byte-level BPE tokenizers that split text as GPT-2, SmolLM, Llama 3 or "
            f"Qwen2 do, and this is {description['model']['type']} with {description['pre_tokenizer']}; "
            "export to compressed-tensors or bitsandbytes instead"
        )
    ids = [*description["model"]["vocab"].values(), *(added["id"] for added in description["added_tokens"])]
    if (largest := max(ids, default=0)) >= vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has a token {largest}, and the model embeddings for {vocab_size} only; save the "
            f"model with resize_token_embeddings({largest + 1}), or its own tokenizer"
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in description["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in description["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    first = (tokenizer("a").input_ids or [None])[0]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": first is not None and first == tokenizer.bos_token_id,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def pre_tokenizer(description: dict[str, Any]) -> str | None:
    """GGUF's name for the way a `tokenizer.json` splits text, or None."""
    pre = description["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        if not splits:
            return "gpt-2"
        return "smollm" if splits == [{"type": "Digits", "individual_digits": True}] else None
    pattern = splits[0].get("pattern", {}).get("Regex") if len(splits) == 1 else None
    return SPLITS.get(pattern) if pattern else None
