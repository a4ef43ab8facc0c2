"""Texts through a Hugging Face model: tokens, batches of like length, sentence embeddings.

A sentence embedding is made of the last hidden states as the model folder says (sentence.py).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tersor.core.errors import DataError, InputError
from tersor.tasks.contract import Output
from tersor.tasks.inputs import Batch, consecutive, device_of
from tersor.tasks.outputs import logits_of
from tersor.tasks.sentence import Embedder, read_embedder
from tersor.tasks.source import DataSource
from tersor.tasks.split import SEED, RowNumbers
from tersor.tasks.takes import part_of

MAX_LENGTH = 256
NO_LIMIT = 1_000_000  # tokenizers that know no limit say 10^30
COUNT_FROM_PADDING = (  # model types whose first token has position pad_token_id + 1: the rows before are not used
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"),
    *("data2vec-text", "xmod", "ibert", "luke", "mluke", "markuplm", "layoutlmv3", "lilt", "esm", "clap_text_model"),
    *("altclip_text_model", "bridgetower_text_model"),
)


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokenized texts, and the model's embedding or logits of them.

    Attributes:
        tokens: one dict of token lists (`input_ids`, `attention_mask`, ...) a text.
        padding: what fills each list up to the longest of its batch, and on which side.
        embedder: how hidden states become an embedding; None asks the model for logits.
        num_truncated: how many texts were cut to `max_length` tokens.
        can_pad: without a padding token, texts run one at a time.
    """

    tokens: list[dict[str, list[int]]]
    padding: dict[str, int]
    padding_side: str
    embedder: Embedder | None
    max_length: int
    num_truncated: int
    can_pad: bool

    @property
    def output(self) -> Output:
        return "logits" if self.embedder is None else "embedding"

    @property
    def lengths(self) -> Int[np.ndarray, " text"]:
        return np.array([len(tokens["input_ids"]) for tokens in self.tokens], dtype=np.int64)

    @property
    def description(self) -> str:
        cut = f", {self.num_truncated:,} of {len(self):,} texts cut" if self.num_truncated else ""
        pooled = f", {self.embedder.description}" if self.embedder else ""
        return f"at most {self.max_length} tokens{cut}{pooled}"

    def __len__(self) -> int:
        return len(self.tokens)

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        """Texts of like length together (little padding); the chunks themselves in a seeded random order, so that a
        reader who takes only the first few gets a fair sample."""
        by_length = rows[np.argsort(self.lengths[rows], kind="stable")]
        chunks = consecutive(by_length, batch_size if self.can_pad else 1)
        return [chunks[i] for i in np.random.default_rng(SEED).permutation(len(chunks))]

    def batch(self, rows: RowNumbers) -> Batch:
        """Padded tensors `[row, position]`."""
        chosen = [self.tokens[row] for row in rows]
        return Batch(
            rows,
            {
                name: pad_sequence([torch.tensor(tokens[name]) for tokens in chosen], True, fill, self.padding_side)
                for name, fill in self.padding.items()
            },
        )

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch."""
        arguments = batch.to(device_of(model))
        if "token_type_ids" in arguments and "token_type_ids" not in inspect.signature(model.forward).parameters:
            del arguments["token_type_ids"]
        return model(**arguments)

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, " row *rest"]:
        """Unit embeddings `[row, dim]`, or logits `[row, class]` (per token: `[row, position, class]`)."""
        output = self.call(model, batch)
        if self.embedder is None:
            return logits_of(output)
        mask = batch.inputs["attention_mask"].to(device_of(model))
        return self.embedder(hidden_of(output), mask)


def tokenize(texts: Sequence[str], source: DataSource, *, max_length: int | None = None, embedding: bool) -> Texts:
    """Tokenize texts once, with special tokens, cut to `max_length` tokens or to what the model can take; None is 256,
    or what a sentence encoder's folder says where that is less."""
    tokenizer = source.need_tokenizer("the data")
    embedder = read_embedder(source.model_folder) if embedding else None
    usual = MAX_LENGTH if embedder is None else min(MAX_LENGTH, embedder.max_length or MAX_LENGTH)
    limit = min(usual if max_length is None else max_length, length_limit(source), tokenizer_limit(tokenizer))
    texts = [text.lower() for text in texts] if embedder is not None and embedder.lower_case else list(texts)
    encoded = tokenizer(list(texts), truncation=True, max_length=limit, return_attention_mask=True, verbose=False)
    tokens = [{name: encoded[name][i] for name in encoded} for i in range(len(texts))]
    for text, lists in zip(texts, tokens, strict=True):
        if not lists["input_ids"]:
            raise DataError(f"the tokenizer makes no tokens of {text[:40]!r}; remove this text")
    check_vocabulary(max(max(lists["input_ids"]) for lists in tokens), source)
    full = [text for text, lists in zip(texts, tokens, strict=True) if len(lists["input_ids"]) >= limit]
    num_truncated = sum(len(ids) > limit for ids in tokenizer(full, verbose=False)["input_ids"]) if full else 0
    vocabulary = getattr(part_of(source.config, "text_config"), "vocab_size", None) or NO_LIMIT
    pad = tokenizer.pad_token_id if (tokenizer.pad_token_id or 0) < vocabulary else None  # no row: one text at a time
    padding = {
        "input_ids": pad or 0,
        "attention_mask": 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    return Texts(
        tokens,
        {name: padding.get(name, 0) for name in tokens[0]},
        tokenizer.padding_side,
        embedder,
        limit,
        num_truncated,
        pad is not None,
    )


def length_limit(source: DataSource) -> int:
    """The number of positions that the model has, as far as its configuration says."""
    config = part_of(source.config, "text_config")
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return NO_LIMIT
    if getattr(config, "model_type", None) in COUNT_FROM_PADDING:
        limit -= (getattr(config, "pad_token_id", None) or 0) + 1
    return max(1, limit)


def tokenizer_limit(tokenizer: Any) -> int:
    """The most tokens that the tokenizer allows in a text. Raises DataError if it gives no number."""
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is None:
        return NO_LIMIT
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise DataError(
            f"the tokenizer's model_max_length is {limit!r}; write a whole number into tokenizer_config.json"
        )
    return int(min(limit, NO_LIMIT))


def check_vocabulary(largest: int, source: DataSource) -> None:
    """Raises DataError for a token that the model has no embedding for."""
    size = getattr(part_of(source.config, "text_config"), "vocab_size", None)
    if not isinstance(size, int) or largest < size:
        return
    raise DataError(
        f"the data has token {largest} ({source.tokenizer.convert_ids_to_tokens(int(largest))!r}), and the model's "
        f"vocabulary has {size:,} (its tokenizer {len(source.tokenizer):,}): put in the tokenizer it was trained with, "
        f"or give the model rows for the new tokens (model.resize_token_embeddings)"
    )


def hidden_of(output: Any) -> Float[Tensor, "row position dim"]:
    """The last hidden states in what an encoder returned."""
    hidden = getattr(output, "last_hidden_state", output)
    if isinstance(hidden, tuple) and hidden:
        hidden = hidden[0]
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise InputError(
            f"the model returned {type(output).__name__} without hidden states [text, position, dim]: sentence "
            f"embeddings need an encoder (AutoModel), not a model with a prediction head"
        )
    return hidden
