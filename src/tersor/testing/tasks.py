"""The laws of a task: its data come in a fixed order, its splits do not meet, and its scores are one row an example."""

from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tersor.tasks.contract import Output, Split, Task, TrainableTask
from tersor.tasks.scores import Scores
from tersor.testing.law import hold, hold_same, speaking_of

FEW = 3  # batches that are looked into


def check_task(task: Task, model: nn.Module) -> None:
    """Hold a task against every law.

    Args:
        model: one that the task can run, as it is before anything is compressed.

    Raises:
        LawBroken: with a sentence that names the task and what went wrong.
    """
    with speaking_of(f"task {getattr(task, 'name', type(task).__name__)}"):
        keeps_the_contract(task)
        task.prepare(model)
        for law in TASK_LAWS:
            law(task, model)
        if isinstance(task, TrainableTask) and task.num_train:
            for training_law in TRAINING_LAWS:
                training_law(task, model)


def keeps_the_contract(task: Task) -> None:
    """Check that every member of the contract exists and is not empty."""
    for member in ("name", "output", "description", "fingerprint", "prepare", "batches", "forward", "score"):
        hold(hasattr(task, member), f"it has no {member}; see tersor.tasks.contract.Task")
    outputs = get_args(Output)
    hold(task.output in outputs, f"output is {task.output!r}; it must be one of {', '.join(outputs)}")
    for member in ("name", "description", "fingerprint"):
        said = getattr(task, member)
        one_line = isinstance(said, str) and bool(said) and "\n" not in said
        hold(one_line, f"{member} is {said!r}; it must be one line of text")


def batches_come_in_a_fixed_order(task: Task, model: nn.Module) -> None:
    """Both splits that compression reads have data, the same each time, in batches of the size that is asked for."""
    splits: tuple[Split, ...] = ("calibration", "eval")
    for split in splits:
        first, second = (list(islice(task.batches(split), FEW)) for _ in range(2))
        hold(bool(first), f"batches('{split}') gives no batch")
        for before, after in zip(tensors_of(first), tensors_of(second), strict=True):
            hold_same(after, before, f"batches('{split}') gives other data the second time")
        for batch in islice(task.batches(split, batch_size=1), FEW):
            rows = getattr(batch, "rows", None)
            if rows is not None:
                hold(len(rows) == 1, f"batches('{split}', batch_size=1) gives a batch of {len(rows)}")


def splits_share_no_rows(task: Task, model: nn.Module) -> None:
    """Check that no calibration example is also an evaluation example."""
    both = sorted(rows_of(task, "calibration") & rows_of(task, "eval"))
    hold(not both, f"rows {both[:5]} are in the calibration split and in the eval split")


def forward_runs_the_model(task: Task, model: nn.Module) -> None:
    """Outputs are finite, a row for each example, differentiable, and the model's mode is left alone."""
    batch = next(iter(task.batches("calibration")))
    for training in (False, True):
        model.train(training)
        output = task.forward(model, batch)
        hold(isinstance(output, Tensor), f"forward gives {type(output).__name__}, not a tensor")
        hold(model.training == training, "forward changes the training mode of the model")
    model.eval()
    output = task.forward(model, batch)
    hold(bool(torch.isfinite(output).all()), "forward gives NaN or infinity for the first calibration batch")
    differentiable = output.requires_grad or not any(p.requires_grad for p in model.parameters())
    hold(differentiable, "forward gives no gradient to the parameters; calibration needs it: no torch.no_grad in there")
    if task.output == "embedding":
        length = output.detach().float().norm(dim=-1)
        unit = bool(torch.allclose(length, torch.ones_like(length), atol=1e-3))
        hold(unit, "output is 'embedding', and the rows that forward gives are not of unit length")


def scores_are_one_row_an_example(task: Task, model: nn.Module) -> None:
    """The same each time, with the columns of their metric; the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    first, second = task.score(model), task.score(model)
    hold(model.training, "score does not undo the evaluation mode")
    model.eval()
    for name, tensor in model.state_dict().items():
        hold_same(tensor, before[name], f"score changes {name} of the model; run it in evaluation mode")
    hold(isinstance(first, Scores), f"score gives {type(first).__name__}; it must give tersor.tasks.scores.Scores")
    columns = len(first.metric.columns)
    rows = first.examples
    fits = rows.ndim == 2 and rows.shape[0] > 0 and rows.shape[1] == columns
    hold(fits, f"score gives examples of shape {rows.shape}; the metric {first.metric.name} wants [example, {columns}]")
    same = np.array_equal(rows, second.examples, equal_nan=True)
    hold(same, "score gives other rows the second time; paired tests need the same examples in the same order")
    known = rows_of(task, "eval")
    if known:
        hold(len(rows) <= len(known), f"score gives {len(rows)} rows for the {len(known)} examples of the eval split")


TASK_LAWS = [
    batches_come_in_a_fixed_order,
    splits_share_no_rows,
    forward_runs_the_model,
    scores_are_one_row_an_example,
]


def epochs_depend_on_the_seed_alone(task: TrainableTask, model: nn.Module) -> None:
    """So that a run that was killed goes on as if it had not been."""
    first, second = (list(islice(task.epoch(seed=0), FEW)) for _ in range(2))
    hold(bool(first), f"epoch gives no batch, and num_train is {task.num_train}")
    for before, after in zip(tensors_of(first), tensors_of(second), strict=True):
        hold_same(after, before, "epoch gives other data for the same seed")


def loss_is_a_number_with_gradients(task: TrainableTask, model: nn.Module) -> None:
    """A finite scalar that every training step can follow downhill."""
    batch = next(iter(task.epoch(seed=0)))
    loss = task.loss(task.forward(model, batch), batch)
    hold(loss.ndim == 0, f"loss gives the shape {list(loss.shape)}; it must be a scalar")
    hold(bool(torch.isfinite(loss)), f"loss gives {loss.item()} for the first train batch")
    hold(loss.requires_grad, "loss has no gradient")


TRAINING_LAWS = [epochs_depend_on_the_seed_alone, loss_is_a_number_with_gradients]


def rows_of(task: Task, split: Split) -> set[int]:
    """The numbers of the split's examples; none where its batches do not say."""
    found: set[int] = set()
    for batch in task.batches(split):
        found |= {int(row) for row in getattr(batch, "rows", ())}
    return found


def tensors_of(batches: Any) -> list[Tensor]:
    """All tensors in some batches: tensors, mappings, sequences, and what has `inputs`."""
    if isinstance(batches, Tensor):
        return [batches]
    if hasattr(batches, "inputs"):
        return tensors_of(batches.inputs)
    if isinstance(batches, dict):
        return [tensor for key in sorted(batches) for tensor in tensors_of(batches[key])]
    if isinstance(batches, list | tuple):
        return [tensor for each in batches for tensor in tensors_of(each)]
    return []
