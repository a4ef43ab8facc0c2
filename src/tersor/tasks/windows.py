"""Token windows: a text as equal pieces for a language model.

The text is tokenized as a whole, without special tokens, and cut every `stride` tokens into windows of `context`; what
is left at the end is dropped. Each token is judged once: in the first window all but the first token, in a later one
its last `stride` tokens (the ones before were judged already and serve as context).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor.core.errors import DataError, InputError
from tersor.tasks.contract import Output
from tersor.tasks.encoder import check_vocabulary, length_limit
from tersor.tasks.inputs import Batch, consecutive, device_of
from tersor.tasks.outputs import logits_of
from tersor.tasks.source import DataSource
from tersor.tasks.split import SEED, RowNumbers, Rows, choose, split_rows

CONTEXT = 512


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens and a language model's logits on them.

    Attributes:
        ids: token ids `[window, position]`.
        first: the first position of each window that is predicted and judged (at least 1), `[window]`.
    """

    ids: Int[np.ndarray, "window position"]
    first: Int[np.ndarray, " window"]

    @property
    def output(self) -> Output:
        return "logits"

    def __len__(self) -> int:
        return len(self.ids)

    def first_few(self, num: int) -> "Windows":
        """The first `num` windows."""
        return Windows(self.ids[:num], self.first[:num])

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        return consecutive(rows, batch_size)

    def batch(self, rows: RowNumbers) -> Batch:
        """`input_ids [row, position]`."""
        return Batch(rows, {"input_ids": torch.from_numpy(self.ids[rows])})

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, "row position vocab"]:
        """Logits `[window, position, vocabulary]`; those at position j predict token j + 1."""
        ids = batch.inputs["input_ids"].to(device_of(model))
        output = model(input_ids=ids, use_cache=False) if isinstance(model, PreTrainedModel) else model(ids)
        logits = logits_of(output)
        if logits.shape[:2] != ids.shape or logits.ndim != 3:
            raise InputError(
                f"the model gives logits {list(logits.shape)} for {list(ids.shape)} tokens; expected "
                f"[window, position, vocabulary] of a causal language model"
            )
        return logits


def open_windows(
    text: str,
    source: DataSource,
    *,
    context: int | None,
    stride: int | None = None,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    calibration_text: str | None = None,
    train_text: str | None = None,
    calibration_examples: int,
) -> tuple[Windows, Rows]:
    """Cut a text into windows and split them.

    `context` None means 512 or what the model can take; `max_tokens` keeps only the text's first tokens. Calibration
    windows never overlap each other, and evaluation never shares a token with them: where `stride < context`, windows
    that touch one held out for calibration are left out.
    """
    context = check_context(context, source)
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"stride is {stride}; expected 1 to {context} (the context)")
    ids = token_ids(text, source)[:max_tokens]
    starts = window_starts(len(ids), context, stride)
    windows = cut(ids, starts, context, np.where(starts == 0, 1, context - stride).clip(1))
    if calibration_text is not None or train_text is not None:
        extra = train = windows.first_few(0)
        if calibration_text is not None:
            extra = calibration_windows(token_ids(calibration_text, source), context, calibration_examples)
        if train_text is not None:
            tokens = token_ids(train_text, source)
            starts = window_starts(len(tokens), context, context)
            train = cut(tokens, starts, context, np.ones(len(starts)))
        rows = split_rows(
            len(windows),
            len(extra),
            len(train),
            calibration_examples=calibration_examples,
            max_examples=max_examples,
            unit="windows",
            separate=source.calibration_name,
            train_name=source.train_name,
        )
        together = (windows, extra, train)
        return Windows(np.concatenate([w.ids for w in together]), np.concatenate([w.first for w in together])), rows
    return windows, hold_out(starts, context, stride, calibration_examples, max_examples)


def check_context(context: int | None, source: DataSource) -> int:
    """Raises InputError for a context or stride that no window can have."""
    limit = length_limit(source)
    if context is None:
        return min(CONTEXT, limit)
    if not 2 <= context <= limit:
        raise InputError(f"context is {context}; this model takes 2 to {limit:,} tokens")
    return context


def token_ids(text: str, source: DataSource) -> Int[np.ndarray, " token"]:
    """The whole text as tokens, without special tokens."""
    tokenizer = source.need_tokenizer("the data")
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    check_vocabulary(int(ids.max(initial=-1)), source)
    return ids


def window_starts(num_tokens: int, context: int, stride: int) -> Int[np.ndarray, " window"]:
    """Start positions of windows in a token sequence; every window is full.

    >>> window_starts(10, 4, 2)
    array([0, 2, 4, 6])
    """
    if num_tokens < context:
        raise DataError(
            f"the text gives {num_tokens} tokens, fewer than one window of {context}; use a longer text or "
            f"a shorter context (option context={max(2, num_tokens // 2)})"
        )
    return np.arange(0, num_tokens - context + 1, stride, dtype=np.int64)


def cut(ids: Int[np.ndarray, " token"], starts: Int[np.ndarray, " window"], context: int, first: np.ndarray) -> Windows:
    """The windows of a token sequence."""
    return Windows(ids[starts[:, None] + np.arange(context)], first.astype(np.int64))


def calibration_windows(ids: Int[np.ndarray, " token"], context: int, wanted: int) -> Windows:
    """At most `wanted` whole windows of a calibration text, drawn as GPTQ's followers do: seed 0, without repeats."""
    num = len(ids) // context
    if wanted < num:
        starts = np.random.default_rng(SEED).choice(max(1, (len(ids) - context) // context), wanted, replace=False)
        starts = starts.astype(np.int64) * context
    else:
        starts = window_starts(len(ids), context, context)
    return cut(ids, starts, context, np.ones(len(starts)))


def hold_out(
    starts: Int[np.ndarray, " window"], context: int, stride: int, calibration_examples: int, max_examples: int | None
) -> Rows:
    """Non-overlapping windows for calibration, and those that share no token with them for evaluation."""
    apart = np.arange(0, len(starts), -(-context // stride), dtype=np.int64)
    if len(apart) < 2:
        raise DataError(
            f"the text gives {len(apart)} window of {context} tokens, too few to hold one out for calibration; use a "
            f"longer text, a shorter context (option context={max(2, context // 4)}), or a separate calibration file"
        )
    calibration = apart[choose(len(apart), min(calibration_examples, max(1, len(apart) // 10)))]
    touching = (np.abs(starts[:, None] - starts[calibration]) < context).any(1)
    judged = np.flatnonzero(~touching)
    if not len(judged):
        raise DataError(
            f"every window overlaps the one held out for calibration; use a longer text or stride={context}"
        )
    kept = judged if max_examples is None else judged[choose(len(judged), max_examples)]
    subset = "" if len(kept) == len(judged) else f" of {len(judged):,}"
    description = f"{len(kept):,}{subset} windows for evaluation, {len(calibration):,} held out for calibration"
    return Rows(calibration, kept, description)
