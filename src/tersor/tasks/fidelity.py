"""Fidelity: does the compressed model do what the original did? Needs no labels.

For logits: how often both rank the same class first (`agreement`; for token logits, the fraction of a window's
positions), and the mean KL divergence from the original to the compressed model, in nats per prediction. For
embeddings: their cosine, and how many of an example's 10 nearest neighbours among the others stay the same. For any
other values (several outputs, images, regressions): how much of the original's variance each example explains
(`explained`: 1 minus its squared distance over the mean squared distance of the original's outputs from their mean; at
least 0), and the relative error.

`prepare` keeps the original's outputs for the eval split in memory: float32 up to 1 GiB, else logits rounded to float16
(then on both sides of the comparison, so that a model always agrees with itself). Token logits are kept for at most
16,384 positions and 2 GiB; further windows are left out when the task is opened, and its description says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import DataError, InputError
from tersor.tasks.contract import Output, Split
from tersor.tasks.inputs import Batch, Inputs, batches, epoch, float_type_of, scatter, scoring
from tersor.tasks.judged import Judged
from tersor.tasks.outputs import check_classes
from tersor.tasks.scores import METRICS, Scores
from tersor.tasks.split import Rows

FLOAT32_BYTES = 2**30
NUM_NEIGHBOURS = 10
CHUNK = 2**24  # logits compared at a time


@dataclass(eq=False)
class Reference:
    """The original's outputs, batch by batch in the order of `batches("eval")`."""

    dtype: torch.dtype = torch.float32
    outputs: list[Tensor] = field(default_factory=list)
    top1: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Fidelity:
    """Unlabelled examples, and the original model's outputs once `prepare` has seen it."""

    inputs: Inputs
    rows: Rows
    about: str
    fingerprint: str
    batch_size: int
    name: str = "fidelity"
    reference: Reference | None = None

    @property
    def output(self) -> Output:
        return self.inputs.output

    @property
    def description(self) -> str:
        """A description of the data, how it was split, and how outputs are read if the model had to be asked."""
        reading = self.inputs.reading if isinstance(self.inputs, Judged) else None
        return f"{self.about}; {reading.note}" if reading is not None and reading.note else self.about

    def prepare(self, original: nn.Module) -> None:
        """Run the original on the eval split and keep its outputs."""
        reference = Reference()
        if isinstance(self.inputs, Judged):
            self.inputs.reading = None
        with scoring(original):
            for batch in self.batches("eval"):
                output = self.forward(original, batch)
                if len(output) != len(batch.rows):
                    raise InputError(
                        f"the model returned {list(output.shape)} for {len(batch.rows)} examples; their axis must be "
                        f"the first"
                    )
                if self.output == "logits":
                    check_classes(output)
                    if not reference.outputs:
                        whole = output.numel() / len(batch.rows) * len(self.rows.eval) * 4
                        reference.dtype = torch.float32 if whole <= FLOAT32_BYTES else torch.float16
                    reference.top1.append(output.argmax(-1).cpu())
                check_original(output, self.output, original)
                reference.outputs.append(_stored(output, reference.dtype).cpu())
        self.reference = reference

    @property
    def num_train(self) -> int:
        return len(self.rows.train)

    def epoch(self, seed: int, batch_size: int | None = None) -> Iterator[Batch]:
        """The train split in an order drawn from `seed`."""
        return epoch(self.inputs, self.rows.train, self.batch_size if batch_size is None else batch_size, seed)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Raises DataError: there are no labels."""
        raise DataError(
            "fidelity reads unlabelled data: distil from a teacher alone (alpha 0), or name a task with labels"
        )

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Batch]:
        """The split's examples in a fixed order."""
        return batches(self.inputs, self.rows[split], self.batch_size if batch_size is None else batch_size)

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, " row *rest"]:
        """Logits `[row, (position,) class]` or unit embeddings `[row, dim]`."""
        return self.inputs.forward(model, batch)

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        """Rows of one column, agreement or cosine; `extras` hold `kl` or `neighbour_overlap`."""
        if split != "eval":
            raise InputError("fidelity keeps the original's outputs for the eval split only; score that one")
        if self.reference is None:
            raise InputError("fidelity compares with the original model: call task.prepare(original) before score")
        with scoring(model):
            if self.output == "logits":
                return self._score_logits(model, self.reference)
            if self.output == "values":
                return self._score_values(model, self.reference)
            return self._score_embeddings(model, self.reference)

    def _score_logits(self, model: nn.Module, reference: Reference) -> Scores:
        pieces, divergence, count = [], 0.0, 0
        for batch, kept, top1 in zip(self.batches("eval"), reference.outputs, reference.top1, strict=True):
            logits = self.forward(model, batch)
            if logits.shape != kept.shape:
                raise InputError(f"outputs {list(logits.shape)}, but the original gave {list(kept.shape)}")
            mask = _mask(batch, logits)
            same = (logits.argmax(-1) == top1.to(logits.device)) & ~logits.isnan().any(-1) & mask
            shares = [(hit.sum() / counted.sum()).item() for hit, counted in zip(same, mask, strict=True)]
            pieces.append((batch.rows, np.array(shares)))
            divergence += kl_divergence(kept.to(logits.device)[mask], _stored(logits, reference.dtype)[mask])
            count += int(mask.sum())
        agreement = scatter(pieces, self.rows.eval)[:, None]
        return Scores(METRICS["agreement"], agreement, {"kl": divergence / count})

    def _score_values(self, model: nn.Module, reference: Reference) -> Scores:
        pieces = []
        for batch, kept in zip(self.batches("eval"), reference.outputs, strict=True):
            values = self.forward(model, batch).float().cpu()
            if values.shape != kept.shape:
                raise InputError(f"outputs {list(values.shape)}, but the original gave {list(kept.shape)}")
            distances = (values.double() - kept.double()).square().sum(1)
            pieces.append((batch.rows, distances.nan_to_num(torch.inf).numpy()))
        squares, spread = scatter(pieces, self.rows.eval), spread_of(reference.outputs)
        length = sum(kept.double().square().sum().item() for kept in reference.outputs) / len(squares)
        explained = np.clip(1 - squares / spread, 0, 1)[:, None]
        return Scores(
            METRICS["explained"], explained, {"relative_error": float(np.sqrt(squares.mean() / max(length, 1e-300)))}
        )

    def _score_embeddings(self, model: nn.Module, reference: Reference) -> Scores:
        old, new = [], []
        for batch, kept in zip(self.batches("eval"), reference.outputs, strict=True):
            old.append((batch.rows, kept.numpy()))
            new.append((batch.rows, self.forward(model, batch).float().cpu().numpy()))
        before, after = scatter(old, self.rows.eval), scatter(new, self.rows.eval)
        if before.shape != after.shape:
            raise InputError(f"embeddings {list(after.shape)}, but the original gave {list(before.shape)}")
        overlap = neighbour_overlap(torch.from_numpy(before), torch.from_numpy(after))
        return Scores(METRICS["cosine"], row_cosine(before, after)[:, None], {"neighbour_overlap": overlap})


def check_original(output: Tensor, kind: Output, original: nn.Module) -> None:
    """Raises InputError where nothing can be compared with what the original gave. Logits may be -inf."""
    broken = output.isnan() if kind == "logits" else ~output.isfinite()
    if not broken.any():
        return
    dtype = float_type_of(original)
    what = "NaN" if output.isnan().any() else "infinite values"
    way_out = "" if dtype == torch.float32 else f", computing in {dtype}: load it in float32 (--dtype float32)"
    raise InputError(f"the original model gives {what} on the fidelity data; nothing can agree with it{way_out}")


def _stored(output: Tensor, dtype: torch.dtype) -> Tensor:
    """An output in the type it is stored in: float32, or float16 cut to its finite range."""
    largest = torch.finfo(torch.float16).max
    return output.float() if dtype == torch.float32 else output.float().clamp(-largest, largest).to(dtype)


def _mask(batch: Batch, logits: Tensor) -> Tensor:
    """Bool mask of the predictions that are scored, `[row]` or `[row, position]`: all but those of padding."""
    attention = batch.inputs.get("attention_mask")
    if attention is not None and attention.shape == logits.shape[:-1]:
        return attention.bool().to(logits.device)
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def spread_of(outputs: list[Float[Tensor, "row value"]]) -> float:
    """The mean squared distance of an example's values from their mean over all examples; where examples have unlike
    numbers of values or are all the same, from nothing. Never 0."""
    count = sum(len(rows) for rows in outputs)
    length = sum(rows.double().square().sum().item() for rows in outputs) / count
    if len({rows.shape[1] for rows in outputs}) > 1:
        return max(length, 1e-300)
    mean = sum(rows.double().sum(0) for rows in outputs) / count
    spread = length - float(mean.square().sum()) if isinstance(mean, Tensor) else length
    return spread if spread > 1e-9 * length else max(length, 1e-300)


def kl_divergence(original: Float[Tensor, "row class_"], compressed: Float[Tensor, "row class_"]) -> float:
    """Sum over rows of KL(original || compressed) in nats; at least 0."""
    total = 0.0
    step = max(1, CHUNK // original.shape[-1])
    for start in range(0, len(original), step):
        log_p = original[start : start + step].float().log_softmax(-1)
        log_q = compressed[start : start + step].float().log_softmax(-1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        total += float(terms.sum(-1).cpu().double().sum())
    return total if not total < 0 else 0.0


def row_cosine(a: Float[np.ndarray, "row dim"], b: Float[np.ndarray, "row dim"]) -> Float[np.ndarray, " row"]:
    """Cosine of rows, exactly 1 for equal ones; NaN counts as 0."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    cosine = np.divide((a * b).sum(-1), norm, out=np.zeros_like(norm), where=norm > 0)
    return np.nan_to_num(np.clip(cosine, -1, 1))


def neighbour_overlap(a: Float[Tensor, "row dim"], b: Float[Tensor, "row other"], k: int = NUM_NEIGHBOURS) -> float:
    """Mean share of each row's `k` nearest others (by cosine) that two embeddings have in common.

    Fewer than 11 rows: `k` is one less than their number; a single row has no neighbours and overlaps fully.
    """
    k = min(k, len(a) - 1)
    if k < 1:
        return 1.0
    shared = 0
    for start in range(0, len(a), 1024):
        near_a, near_b = (_neighbours(x, start, min(start + 1024, len(x)), k) for x in (a, b))
        shared += int((near_a[:, :, None] == near_b[:, None, :]).sum())
    return shared / (len(a) * k)


def _neighbours(x: Float[Tensor, "row dim"], start: int, stop: int, k: int) -> Tensor:
    likeness = x[start:stop] @ x.T
    likeness[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
    return likeness.topk(k, dim=-1).indices
