"""Perplexity of a causal language model on a text, by windows.

The protocol of the GPTQ papers (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): the text without special
tokens, non-overlapping windows, in each the mean negative log-likelihood of every token but the first. With
`stride < context` windows overlap and only their new tokens are judged (see windows.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tersor.tasks.contract import Output, Split
from tersor.tasks.inputs import Batch, batches, epoch, scatter, scoring
from tersor.tasks.scores import METRICS, Scores
from tersor.tasks.source import DataSource
from tersor.tasks.split import Rows
from tersor.tasks.takes import refuse_encoder_decoder
from tersor.tasks.text import fingerprint, read_text
from tersor.tasks.windows import Windows, open_windows

CHUNK = 2**24  # float32 logits turned into probabilities at a time: 64 MiB


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Token windows; a row is (nats, number of predicted tokens) of one window."""

    windows: Windows
    rows: Rows
    description: str
    fingerprint: str
    batch_size: int = 4
    name: str = "perplexity"
    output: Output = "logits"

    def prepare(self, original: nn.Module) -> None:
        """Do nothing: the text itself holds the tokens to predict."""

    @property
    def num_train(self) -> int:
        return len(self.rows.train)

    def epoch(self, seed: int, batch_size: int | None = None) -> Iterator[Batch]:
        """The train windows in an order drawn from `seed`."""
        return epoch(self.windows, self.rows.train, self.batch_size if batch_size is None else batch_size, seed)

    def loss(self, output: Float[Tensor, "window position vocab"], batch: Batch) -> Float[Tensor, ""]:
        """Mean negative log-likelihood of every token but the first, in nats."""
        targets = batch.inputs["input_ids"][:, 1:].to(output.device)
        return cross_entropy(output[:, :-1].flatten(0, 1).float(), targets.flatten())

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Batch]:
        """The split's windows, `batch_size` (4) at a time, in the order of the text."""
        return batches(self.windows, self.rows[split], self.batch_size if batch_size is None else batch_size)

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, "window position vocab"]:
        """Logits `[window, position, vocabulary]`; those at position j predict token j + 1."""
        return self.windows.forward(model, batch)

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        """Rows (summed negative log-likelihood in nats, number of predicted tokens), one per window."""
        pieces = []
        with scoring(model):
            for batch in self.batches(split):
                logits = self.forward(model, batch)
                ids = batch.inputs["input_ids"]
                pairs = zip(logits, ids, batch.rows, strict=True)
                rows = [window_nll(one, tokens, int(self.windows.first[row])) for one, tokens, row in pairs]
                pieces.append((batch.rows, np.array(rows)))
        return Scores(METRICS["perplexity"], scatter(pieces, self.rows[split]))


def window_nll(
    logits: Float[Tensor, "position vocab"], ids: Int[Tensor, " position"], first: int
) -> tuple[float, float]:
    """Negative log-likelihood (float32, summed in float64) of tokens `first` onwards, and how many they are."""
    targets = ids[first:].to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(targets), step):
        chosen = targets[start : start + step]
        at = first - 1 + start
        nll = cross_entropy(logits[at : at + len(chosen)].float(), chosen, reduction="none")
        total += nll.cpu().double().sum()
    return float(total), float(len(targets))


def open_perplexity(
    source: DataSource,
    *,
    batch_size: int = 4,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    calibration_examples: int = 128,
) -> Perplexity:
    """Read a UTF-8 text for a causal language model; `context` None is 512 or what the model can take."""
    data = source.need_data("perplexity", "a UTF-8 text file")
    refuse_encoder_decoder(source.config, "perplexity")
    source.need_tokenizer(str(data))
    windows, rows = open_windows(
        read_text(data),
        source,
        context=context,
        stride=stride,
        max_tokens=max_tokens,
        max_examples=max_examples,
        calibration_text=None if source.calibration is None else read_text(source.calibration),
        train_text=None if source.train is None else read_text(source.train),
        calibration_examples=calibration_examples,
    )
    length = windows.ids.shape[1]
    head = f"first {max_tokens:,} tokens, " if max_tokens is not None else ""
    protocol = f"context {length}, stride {length if stride is None else stride}, {head}no special tokens"
    description = f"perplexity on {data.name}: {rows.description}; {protocol}"
    return Perplexity(windows, rows, description, fingerprint(data), batch_size)
