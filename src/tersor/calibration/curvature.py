"""The curvature of the loss (Fisher information) at every site, from gradients over calibration data.

To second order, changing the weights W of a site by D costs

    1/2 sum_ij F_ij D_ij^2,    F_ij = E[(dL/dW_ij)^2]

where F is the diagonal of the Fisher information (Amari 1998; as a saliency for pruning: Theis et al. 2018,
https://arxiv.org/abs/1801.05787). For it to be the curvature of the divergence from the *original* model, the loss is
not taken against labels: for logits, classes are sampled from the model's own distribution; for embeddings and values,
the output is projected on random directions, whose squared gradient is the curvature of half the squared distance
(for unit embeddings: of 1 - cosine). Examples are independent and their gradients have mean zero, so the square of a
batch's gradient sum estimates the sum of the examples' squares.

F is kept as its row and column sums (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235):
`F_ij = row_i column_j`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersor.core.errors import DataError
from tersor.core.threads import mean
from tersor.kernels import reference
from tersor.methods.stats import Stats
from tersor.nn.copies import materialized
from tersor.nn.sites import check_finite, check_has_sites, find_sites
from tersor.tasks.contract import Output, Task
from tersor.tasks.inputs import scoring

BATCH_SIZE = 8  # small batches: more independent samples of the gradient from the same data
MOST = 1e30  # curvature of a row, which float32 still holds when it is multiplied
LOGITS = 2**25  # numbers of output at a time: a language model's logits and their gradients are its largest tensors


def estimate_fisher(
    model: nn.Module, task: Task, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Stats]:
    """Statistics of every site over the task's calibration split, keyed by site name.

    The model is run in eval mode and left as it was. Sites the data never reaches get zero curvature.
    """
    check_has_sites(model)
    model = materialized(model)
    sites = find_sites(model)
    for site in sites:
        check_finite(site, site.matrix(model))
    weights = [site.weight(model) for site in sites]
    rows = [torch.zeros(site.shape[0], dtype=torch.float64) for site in sites]
    columns = [torch.zeros(site.shape[1], dtype=torch.float64) for site in sites]
    generator = torch.Generator().manual_seed(seed)
    batches = list(task.batches("calibration", batch_size=batch_size(model, task)))
    training = [(module, module.training) for module in model.modules()]
    required = [weight.requires_grad for weight in weights]
    num_examples = 0
    try:
        model.eval()
        for weight in weights:
            weight.requires_grad_(True)
        for done, batch in enumerate(batches):
            if progress:
                progress("calibrating", done, len(batches))
            with reference(), torch.enable_grad():
                output = task.forward(model, batch)
                loss = sampled_loss(output.float(), task.output, generator)
            num_examples += len(output)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for site, row, column, gradient in zip(sites, rows, columns, gradients, strict=True):
                if gradient is not None:
                    square = site.fold.matrix(gradient).double().square()
                    row += square.sum(1).cpu()
                    column += square.sum(0).cpu()
    finally:
        for module, was in training:
            module.training = was
        for weight, was in zip(weights, required, strict=True):
            weight.requires_grad_(was)
    if progress:
        progress("calibrating", len(batches), len(batches))
    return {
        site.name: factored(row / num_examples, column / num_examples)
        for site, row, column in zip(sites, rows, columns, strict=True)
    }


def batch_size(model: nn.Module, task: Task) -> int:
    """The number of examples run at a time. Raises DataError if there is none."""
    first = next(iter(task.batches("calibration", batch_size=1)), None)
    if first is None:
        raise DataError(f"{task.name}: the calibration split is empty; give more data, or --calibration FILE")
    with reference(), scoring(model):
        output = task.forward(model, first)
    return max(1, min(BATCH_SIZE, LOGITS * len(output) // output.numel()))


def sampled_loss(output: Tensor, kind: Output, generator: torch.Generator) -> Tensor:
    """A random scalar whose gradient's second moment is the curvature of the divergence from `output`, summed over
    examples. Logits `[..., class]` of one example at many positions count as their mean over positions."""
    if kind == "logits":
        flat = output.flatten(0, -2)
        classes = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).to(flat.device)
        per_position = -flat.log_softmax(-1).gather(1, classes).view(output.shape[:-1])
        # Positions are independent too: dividing by sqrt(P) makes the square the mean of their curvatures.
        num_positions = max(1, per_position[0].numel())
        return per_position.sum() / num_positions**0.5
    direction = torch.randn(output.shape, generator=generator).to(output.device)
    return (output * direction).sum()


def factored(row: Tensor, column: Tensor) -> Stats:
    """Row and column sums of F as `F_ij = row_weight_i * column_weight_j`, with columns of mean one."""
    mean_column = mean(column).clamp_min(1e-300)
    row_weight = (row / column.numel()).clamp(max=MOST)
    return Stats(row_weight=row_weight.float(), column_weight=(column / mean_column).float())
