"""The one training loop: every step that trains says what its loss is, and this file does the rest.

`train` runs on accelerate, so the same call trains on a CPU, on one GPU, or under `accelerate launch` on many. It stops
when the loss is no longer a number and takes the last good weights back; it can be killed at any time and goes on from
its journal.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import DataError, InputError
from tersor.core.progress import Progress, silent
from tersor.nn.packed import Stored
from tersor.tasks.contract import Task, TrainableTask
from tersor.tasks.inputs import device_of
from tersor.training.journal import Journal, Tensors, pack_optimizer, unpack_optimizer
from tersor.training.masks import Masks
from tersor.training.settings import TrainingStep, check_trainable
from tersor.training.setup import checkpoint_activations, make_optimizer, make_scheduler, start, usual_groups

Objective = Callable[[nn.Module, Any], Tensor]  # model and batch to a scalar loss; an nn.Module if it is trained, too
OnStep = Callable[[int, int], None]  # before each step: its number, and how many there are
NUM_GOOD = 20  # copies of good weights taken in a run, evenly


@dataclass
class Curve:
    """The record of a training run: its losses and held-out scores.

    Attributes:
        name: of the step that trained.
        losses: of every optimizer step.
        scores: (steps done, score of the held-out split).
        metric: what the scores are.
        num_steps: optimizer steps planned.
        seconds: of the run, over all its restarts.
        notes: what the user should know: stopped early, a loss that was not a number.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    metric: str = ""
    num_steps: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self, points: int = 200) -> dict[str, Any]:
        """Plain data; losses as means over at most `points` equal stretches."""
        size = max(1, math.ceil(len(self.losses) / points))
        stretches = [self.losses[start : start + size] for start in range(0, len(self.losses), size)]
        means = [sum(stretch) / len(stretch) for stretch in stretches]
        plain = {name: value for name, value in vars(self).items() if name != "losses"}
        return {**plain, "losses": means, "steps_per_loss": size}


def train(
    model: nn.Module,
    task: Task | None,
    objective: Objective,
    settings: TrainingStep,
    *,
    name: str = "training",
    seed: int = 0,
    groups: Sequence[dict[str, Any]] | None = None,
    masks: Masks | None = None,
    on_step: OnStep = lambda step, num_steps: None,
    start: float = 0.0,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Curve:
    """Train `model` in place; it comes back on the device and in the mode that it came in.

    Args:
        task: gives the train split.
        objective: the loss of a batch; if it is a module with parameters (projections), they are trained along.
        groups: parameter groups for the optimizer (`params`, and what differs from `settings`); None: every parameter
            of the model that requires gradients, matrices with weight decay.
        masks: weights that stay zero; `on_step` may change them.
        on_step: called before every step with its number and how many there are.
        start: the fraction of the steps that is left out, together with its data and its learning rates.
        journal: where checkpoints go; an earlier one of the same run is taken up.

    Raises:
        DataError: the task has no train split, or already the first loss is not a number.
        InputError: nothing in the model can be trained.
        MissingExtra: without accelerate.
    """
    trainable = check_trainable(task, name)
    run = Run(model, trainable, objective, settings, name, seed, groups, masks or Masks(), on_step, journal, progress)
    return run.run(start)


class Run:
    """One call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        task: TrainableTask,
        objective: Objective,
        settings: TrainingStep,
        name: str,
        seed: int,
        groups: Sequence[dict[str, Any]] | None,
        masks: Masks,
        on_step: OnStep,
        journal: Journal | None,
        progress: Progress,
    ):
        self.model, self.task, self.objective, self.settings = model, task, objective, settings
        self.seed, self.masks, self.on_step, self.journal, self.progress = seed, masks, on_step, journal, progress
        self.accelerator = start(settings)
        self.extra = objective if isinstance(objective, nn.Module) else nn.Module()
        self.groups = list(groups) if groups is not None else usual_groups(model, self.extra, settings)
        self.batches_per_epoch = math.ceil(task.num_train / settings.batch_size)
        per_step = settings.accumulate * self.accelerator.num_processes
        self.num_steps = settings.num_steps or math.ceil(settings.epochs * self.batches_per_epoch / per_step)
        self.curve = Curve(name, num_steps=self.num_steps)
        self.best: tuple[float, Tensors] | None = None
        self.num_worse = 0

    def run(self, start: float = 0.0) -> Curve:
        came_from, training = device_of(self.model), [(module, module.training) for module in self.model.modules()]
        caller = torch.get_rng_state()
        torch.manual_seed(self.seed)
        try:
            self.model.to(self.accelerator.device)
            self.extra.to(self.accelerator.device)
            if self.settings.gradient_checkpointing:
                checkpoint_activations(self.model)
            self.optimizer = make_optimizer(self.groups, self.settings)
            self.masks.enforce(self.model, self.optimizer)
            self.scheduler = make_scheduler(self.optimizer, self.settings, self.num_steps)
            done = self.take_up() or self.skip(round(start * self.num_steps))
            self.steps(done)
        finally:
            self.model.to(came_from)
            for module, flag in training:
                module.training = flag
            torch.set_rng_state(caller)
        return self.curve

    def skip(self, num_steps: int) -> int:
        """Skip the steps that are done already; returns how many."""
        if num_steps:
            self.optimizer.step()  # moves nothing without gradients; a scheduler warns where there was no step before
        for _ in range(num_steps):
            self.scheduler.step()
        return num_steps

    def steps(self, done: int) -> None:
        """Train from step `done` on."""
        accelerator, several = self.accelerator, self.accelerator.num_processes > 1
        model = accelerator.prepare_model(self.model) if several else self.model
        optimizer = accelerator.prepare_optimizer(self.optimizer)
        batches = self.batches(done * self.settings.accumulate)
        good: tuple[int, Tensors] | None = None
        began, before = time.monotonic(), self.curve.seconds
        while done < self.num_steps:
            self.on_step(done, self.num_steps)
            self.model.train()
            losses = []
            for _ in range(self.settings.accumulate):
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        loss = self.objective(model, next(batches))
                    losses.append(loss.item())
                    if not math.isfinite(losses[-1]):
                        self.go_back(done, good)
                        return
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and self.settings.clip_norm is not None:
                        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                        accelerator.clip_grad_norm_(parameters, self.settings.clip_norm)
                    if good is None or (done - good[0]) * NUM_GOOD >= self.num_steps:
                        good = None  # one copy at a time
                        good = (done, self.copy())  # these very weights have just given a finite loss
                    optimizer.step()
                    optimizer.zero_grad()
            self.scheduler.step()
            done += 1
            self.curve.losses.append(sum(losses) / len(losses))
            self.curve.seconds = before + time.monotonic() - began
            stop = self.evaluate(done)
            self.progress(self.sentence(), done, self.num_steps)
            if stop:
                self.curve.notes.append(f"stopped after {done} of {self.num_steps} steps: no better score")
                break
            if self.journal is not None and (self.journal.is_due or done == self.num_steps):
                self.checkpoint(done)
        if self.settings.patience is not None and self.best is not None:
            self.put_back(self.best[1])
        if self.journal is not None:
            self.checkpoint(self.num_steps)

    def batches(self, skip: int) -> Iterator[Any]:
        """This process's share of the train split, epoch after epoch, without the first `skip`."""
        epochs = (self.task.epoch(self.seed + number, self.settings.batch_size) for number in count())
        endless = (batch for epoch in epochs for batch in epoch)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return islice(endless, rank + skip * world, None, world)

    def evaluate(self, done: int) -> bool:
        """Score the held-out split when a score is due; True if training shall stop."""
        times = self.settings.num_evaluations
        if not times or done * times // self.num_steps == (done - 1) * times // self.num_steps:
            return False
        scores = held_out_scores(self.task, self.model)
        if scores is None:
            return False
        self.curve.metric = scores.metric.name
        self.curve.scores.append((done, scores.value))
        value = scores.value if scores.metric.higher_is_better else -scores.value
        if self.settings.patience is None:
            return False
        if self.best is None or value > self.best[0]:
            self.best, self.num_worse = (value, self.copy()), 0
        else:
            self.num_worse += 1
        return self.num_worse >= self.settings.patience

    def sentence(self) -> str:
        """The text that the progress bar shows."""
        recent = self.curve.losses[-20:]
        score = f", {self.curve.metric} {self.curve.scores[-1][1]:.4g}" if self.curve.scores else ""
        return f"{self.curve.name}: loss {sum(recent) / len(recent):.4g}{score}"

    def go_back(self, done: int, good: tuple[int, Tensors] | None) -> None:
        """Restore the last good weights after a loss that is not a number."""
        cure = f"lower learning_rate ({self.settings.learning_rate}) or use precision: float32"
        if good is None:
            raise DataError(f"{self.curve.name}: already the first loss is NaN or infinite; check the data, or {cure}")
        self.put_back(good[1])
        self.curve.notes.append(
            f"the loss became NaN or infinite at step {done + 1}: stopped, and kept the weights of step {good[0]}; "
            f"{cure}"
        )

    def state(self) -> Tensors:
        """Everything that training changes, by name: parameters, buffers, the objective's own, masks."""
        tensors: Tensors = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        fixed = {f"{path}." for path, module in self.model.named_modules() if isinstance(module, Stored)}
        for name, buffer in self.model.named_buffers():
            if not any(name.startswith(path) for path in fixed):
                tensors[f"model.{name}"] = buffer
        tensors |= {f"objective.{name}": tensor for name, tensor in self.extra.state_dict(keep_vars=True).items()}
        return tensors

    def copy(self) -> Tensors:
        """A copy of the state on the CPU."""
        masks = {f"masks.{name}": mask for name, mask in self.masks.state().items()}
        return {name: tensor.detach().cpu().clone() for name, tensor in (self.state() | masks).items()}

    @torch.no_grad()
    def put_back(self, tensors: Tensors) -> None:
        """Restore the state from what `copy` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        masks = {name.removeprefix("masks."): mask for name, mask in tensors.items() if name.startswith("masks.")}
        self.masks.load(masks)
        self.masks.refresh(self.model)

    def checkpoint(self, done: int) -> None:
        """Write a checkpoint of the run to the journal."""
        if self.journal is None or not self.accelerator.is_main_process:
            return
        tensors, plain = pack_optimizer(self.optimizer)
        tensors = {**self.copy(), **tensors, "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        if self.best is not None:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best[1].items()}
        facts = {
            "done": done,
            "optimizer": plain,
            "scheduler": self.scheduler.state_dict(),
            "curve": vars(self.curve),
            "best": None if self.best is None else self.best[0],
            "num_worse": self.num_worse,
        }
        self.journal.write(tensors, facts)

    def take_up(self) -> int:
        """Resume from the journal's checkpoint, if it has one; returns the number of steps that are done."""
        found = None if self.journal is None else self.journal.read()
        if found is None:
            return 0
        tensors, facts = found
        self.put_back({name: tensor for name, tensor in tensors.items() if name.startswith(OWN)})
        unpack_optimizer(self.optimizer, tensors, facts["optimizer"])
        self.scheduler.load_state_dict(facts["scheduler"])
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        if facts["best"] is not None:
            best = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
            self.best = (facts["best"], best)
        self.num_worse = facts["num_worse"]
        self.curve = Curve(**{**facts["curve"], "scores": [(step, score) for step, score in facts["curve"]["scores"]]})
        return facts["done"]


OWN = ("model.", "objective.", "masks.")


def held_out_scores(task: Task, model: nn.Module) -> Any:
    """Scores of the calibration split, which is held out of training; None where the task cannot score it."""
    try:
        return task.score(model, "calibration")
    except InputError:  # no labels there, or fidelity, which knows the original on the eval split only
        return None
