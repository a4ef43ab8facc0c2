"""The distance of a changed model's outputs from the original's, in the unit of the task's output."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from tersor.calibration.inputs import position_mask
from tersor.core.threads import total
from tersor.tasks.contract import Output, Split, Task
from tersor.tasks.fidelity import kl_divergence
from tersor.tasks.inputs import scoring

UNITS: dict[Output, str] = {
    "logits": "nats per prediction",
    "embedding": "1 - cosine",
    "values": "half the squared distance",
}
NUM_EXAMPLES = 64  # outputs are compared on this many examples
NUM_PREDICTIONS = 2048  # and on no more predictions than that


def outputs(
    model: nn.Module, task: Task, split: Split = "eval", num_wanted: int = NUM_EXAMPLES, batch_size: int | None = None
) -> Iterator[Tensor]:
    """The outputs of a model for the first examples of a split: rows `[prediction, class]` or `[example, value]`.

    Args:
        batch_size: None takes 1 where the outputs are logits, else 32.
    """
    num_examples = num_rows = 0
    for batch in task.batches(split, batch_size or (1 if task.output == "logits" else 32)):
        with scoring(model):  # left again before the caller goes on, who may read two models in turn
            output = task.forward(model, batch).float()
        mask = position_mask(batch)
        if task.output != "logits":
            rows = output.reshape(len(output), -1)
        elif mask is not None and mask.shape == output.shape[:-1]:
            rows = output[mask.bool().to(output.device)]
        else:
            rows = output.flatten(0, -2)
        yield rows[: NUM_PREDICTIONS - num_rows].cpu()
        num_examples, num_rows = num_examples + len(output), num_rows + len(rows)
        if num_examples >= num_wanted or num_rows >= NUM_PREDICTIONS:
            return


def divergence(original: Iterable[Tensor], compressed: Iterable[Tensor], kind: Output) -> float:
    """The mean over predictions of the KL divergence in nats, or over examples of half the squared distance (for unit
    embeddings: 1 - cosine)."""
    summed, count = 0.0, 0
    for before, after in zip(original, compressed, strict=True):
        count += len(before)
        if kind == "logits":
            summed += kl_divergence(before, after)
        else:
            summed += 0.5 * total((after - before).double().square()).item()
    return summed / max(1, count)
