"""Semantic textual similarity: does the cosine of two sentence embeddings order pairs as people do?

Cer et al. 2017, "SemEval-2017 Task 1" (STS-B), https://arxiv.org/abs/1708.00055. The metric is Spearman's rank
correlation of cosine and human score.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tersor.core.errors import DataError, InputError
from tersor.tasks.contract import Output, Split
from tersor.tasks.encoder import Texts, tokenize
from tersor.tasks.inputs import Batch, batches, consecutive, scatter, scoring
from tersor.tasks.scores import METRICS, Scores
from tersor.tasks.source import DataSource
from tersor.tasks.split import Rows, split_rows
from tersor.tasks.table import is_table, read_rows, to_number
from tersor.tasks.text import fingerprint, passages, read_text

COLUMNS = {"sentence1": ("sentence1",), "sentence2": ("sentence2",), "score": ("score", "similarity", "label")}


@dataclass(frozen=True, eq=False)
class Similarity:
    """Pairs of sentences with a score.

    Attributes:
        sentences: every sentence once a pair, tokenized.
        pairs: which two sentences make a row, `[row, 2]` (an unpaired calibration passage stands twice).
        target: the human score, NaN where there is none, `[row]`.
    """

    sentences: Texts
    pairs: Int[np.ndarray, "row 2"]
    target: Float[np.ndarray, " row"]
    rows: Rows
    description: str
    fingerprint: str
    batch_size: int = 32
    name: str = "similarity"
    output: Output = "embedding"

    def prepare(self, original: nn.Module) -> None:
        """Do nothing: the scores come with the data."""

    @property
    def num_train(self) -> int:
        return len(self.rows.train)

    def epoch(self, seed: int, batch_size: int | None = None) -> Iterator[Batch]:
        """Both sentences of each train pair, one after the other, in an order drawn from `seed`."""
        order = np.random.default_rng(seed).permutation(self.rows.train)
        for chunk in consecutive(order, self.batch_size if batch_size is None else batch_size):
            yield self.sentences.batch(self.pairs[chunk].reshape(-1))

    def loss(self, output: Float[Tensor, "sentence dim"], batch: Batch) -> Float[Tensor, ""]:
        """Mean squared difference of cosine and human score, the largest score being 1 (Reimers and Gurevych 2019,
        https://arxiv.org/abs/1908.10084)."""
        target = self.target[self.pair_of(batch)]
        if np.isnan(target).any():
            raise DataError("the train split was read from plain text and has no scores: distil from a teacher alone")
        wanted = torch.from_numpy(target / np.nanmax(self.target)).to(output)
        left, right = output.unflatten(0, (-1, 2)).unbind(1)
        return ((left * right).sum(-1) - wanted).square().mean()

    def pair_of(self, batch: Batch) -> Int[np.ndarray, " pair"]:
        """The pairs of a train batch."""
        order = np.argsort(self.pairs[:, 0], kind="stable")
        return order[np.searchsorted(self.pairs[order, 0], batch.rows[::2])]

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Batch]:
        """The split's sentences, `batch_size` (32) at a time; `batch.rows` are sentence numbers."""
        sentences = np.unique(self.pairs[self.rows[split]])
        return batches(self.sentences, sentences, self.batch_size if batch_size is None else batch_size)

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, "sentence dim"]:
        """The embeddings of a batch, scaled to unit length."""
        return self.sentences.forward(model, batch)

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        """One row per pair, `[pair, 2]`: cosine and human score, in the order of the file."""
        rows = self.rows[split]
        if np.isnan(self.target[rows]).any():
            raise InputError(f"the {split} split was read from plain text and has no scores; score the eval split")
        with scoring(model):
            pieces = [(b.rows, self.forward(model, b).cpu().double().numpy()) for b in self.batches(split)]
        left, right = (scatter(pieces, self.pairs[rows, side]) for side in (0, 1))
        cosine = (left * right).sum(-1)
        return Scores(METRICS["spearman"], np.stack([cosine, self.target[rows]], axis=-1))


def open_similarity(
    source: DataSource,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    max_examples: int | None = None,
    calibration_examples: int = 128,
) -> Similarity:
    """Read `sentence1,sentence2,score` rows (csv, tsv or jsonl; header or not) for a sentence encoder."""
    data = source.need_data("similarity", "a csv, tsv or jsonl file with sentence1,sentence2,score")
    source.need_tokenizer(str(data))
    sentences, pairs, target = _read_pairs(data)
    sizes = [len(pairs), 0, 0]
    for place, file in ((1, source.calibration), (2, source.train)):
        if file is not None:
            more_sentences, more_pairs, more_target = _read_pairs(file, plain_text=True)
            pairs = np.concatenate([pairs, more_pairs + len(sentences)])
            target = np.concatenate([target, more_target])
            sentences = sentences + more_sentences
            sizes[place] = len(more_pairs)
    rows = split_rows(
        *sizes,
        calibration_examples=calibration_examples,
        max_examples=max_examples,
        separate=source.calibration_name,
        train_name=source.train_name,
    )
    texts = tokenize(sentences, source, max_length=max_length, embedding=True)
    description = f"similarity on {data.name}: {rows.description}; {texts.description}, Spearman of cosine"
    return Similarity(texts, pairs, target, rows, description, fingerprint(data), batch_size)


def _read_pairs(
    path: Path, plain_text: bool = False
) -> tuple[list[str], Int[np.ndarray, "row 2"], Float[np.ndarray, " row"]]:
    """Sentences, the pairs they form, and the scores; of plain text, where allowed, passages without scores."""
    if plain_text and not is_table(path):
        texts = passages(read_text(path))
        alone = np.arange(len(texts), dtype=np.int64)
        return texts, np.stack([alone, alone], axis=-1), np.full(len(texts), np.nan)
    rows = read_rows(path, COLUMNS)
    sentences = [row.cells[side] for row in rows for side in ("sentence1", "sentence2")]
    target = np.array([to_number(path, row, "score") for row in rows])
    return sentences, np.arange(2 * len(rows), dtype=np.int64).reshape(-1, 2), target
