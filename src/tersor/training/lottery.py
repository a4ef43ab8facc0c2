"""Lottery tickets: iterative magnitude pruning with rewinding (Frankle & Carbin 2018, https://arxiv.org/abs/1803.03635).

Train, drop the smallest of the weights that are left, put the others back to what they were early in training, and
again. The small network that is left, trained from there, is the ticket. The claim is that it owes its score to those
very early weights; `reinit` is the control that can refute it: the same mask over new random ones.

Larger networks have to go back to a little later than the start (`rewind_to`; Frankle et al. 2019,
https://arxiv.org/abs/1912.05671). Going back in the learning rates alone, weights kept, does as well (Renda et al.
2020, https://arxiv.org/abs/2003.02389).
"""

import math
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.schemes.assignment import Patterns
from tersor.steps.preview import Preview
from tersor.training.finetune import task_loss
from tersor.training.job import Job
from tersor.training.journal import Journal
from tersor.training.loop import train
from tersor.training.masks import MaskChoice, Scope, empty_sites
from tersor.training.prune import check_sparsities
from tersor.training.settings import TrainingStep, check_trainable

OTHER_SEED = 1_000_003  # added to the seed where new weights are drawn


class LotteryStep(TrainingStep):
    """Recipe step `lottery`: train, prune and rewind, round after round, and train what is left.

    `epochs` or `num_steps` are those of one training; there is one more of them than rounds. The weights that the model
    comes with are the initial ones: for the experiment of the paper, give it a model that was never trained.

    Attributes:
        sparsity: the fraction of the weights that is dropped in the end; exact to one weight.
        fraction: of the weights that are left, how many a round drops.
        rewind: `weights` go back together with the learning rate and the data, or the `learning-rate` and the data
            alone. The optimizer starts anew.
        rewind_to: how far back, as a fraction of a training: 0 is its start.
        reinit: the control: before the last training, all parameters are drawn at random again, and it is a whole one.
        scope, rules, exclude: as for the step `prune`.
    """

    step: Literal["lottery"] = "lottery"
    sparsity: float = Field(default=0.9, gt=0, lt=1)
    fraction: float = Field(default=0.2, gt=0, lt=1)
    rewind: Literal["weights", "learning-rate"] = "weights"
    rewind_to: float = Field(default=0.0, ge=0, lt=1)
    reinit: bool = False
    scope: Scope = "global"
    rules: dict[str, float] = Field(default_factory=dict)
    exclude: Patterns = ()

    @model_validator(mode="after")
    def fields_go_together(self) -> Self:
        check_sparsities(self.sparsity, self.rules)
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*self.rules, *self.exclude)

    @property
    def num_rounds(self) -> int:
        """The number of pruning rounds; the last one drops what is missing to `sparsity`."""
        left = 1 - max(self.sparsity, *self.rules.values(), 0.0)
        return math.ceil(math.log(left) / math.log(1 - self.fraction) - 1e-9)

    @property
    def choice(self) -> MaskChoice:
        """The choice of the weights that are pruned when all rounds are done."""
        return MaskChoice(self.sparsity, self.scope, "unstructured", self.rules, self.exclude)

    def check(self, preview: Preview) -> None:
        super().check(preview)
        self.choice.check(preview)
        if self.reinit:
            check_resettable(preview.model)

    def run(self, job: Job) -> None:
        """Find the ticket and train it; every later step holds its mask.

        Raises what `train` and `Choice.groups` raise, and for `reinit` InputError where a module cannot draw new
        weights.
        """
        task = check_trainable(job.task, self.step)
        choice = self.choice
        choice.groups(job.model)  # what is wrong with it is said before anything is done
        if self.reinit:
            check_resettable(job.model)
        early = RewindPoint(job.model, self.rewind_to, beside(job.journal, "early"))
        for number in range(self.num_rounds + 1):
            fresh = self.reinit and number == self.num_rounds
            if number:
                choice.tighten(job.model, job.masks, lambda end, n=number: min(end, 1 - (1 - self.fraction) ** n))  # type: ignore[misc]
                if fresh:
                    reset(job.model, job.seed + OTHER_SEED)
                elif self.rewind == "weights":
                    early.put_back()
            curve = train(
                job.model,
                task,
                task_loss(task),
                self,
                name=f"{self.step}, round {number} of {self.num_rounds}",
                seed=job.seed,
                masks=job.masks,
                on_step=early.take if number == 0 else lambda step, num_steps: None,
                start=0.0 if fresh or number == 0 else self.rewind_to,
                journal=beside(job.journal, f"round-{number}{'-reinit' if fresh else ''}"),
                progress=job.progress,
            )
            job.curves.append(curve)
        curve.notes += empty_sites(job.masks)


class RewindPoint:
    """The weights that are rewound to; in a file, too, where there is a journal, for a run that is taken up later."""

    def __init__(self, model: nn.Module, when: float, journal: Journal | None):
        self.model, self.when, self.journal = model, when, journal
        self.state: dict[str, Tensor] = {}

    def take(self, step: int, num_steps: int) -> None:
        """Keep the weights if this step of the first training is the one to rewind to."""
        if step == round(self.when * num_steps):
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            if self.journal is not None:
                self.journal.write(self.state, {})

    def put_back(self) -> None:
        """Rewind the weights. Raises InputError where they were on disk and are not any more."""
        if not self.state and self.journal is not None:
            found = self.journal.read()
            if found is None:
                raise InputError(
                    f"{self.journal.path}: the weights to rewind to are gone; delete this folder and start anew"
                )
            self.state = found[0]
        self.model.load_state_dict(self.state)


def beside(journal: Journal | None, name: str) -> Journal | None:
    """A journal of the same run with a file of its own."""
    return journal and replace(journal, path=journal.path.with_stem(f"{journal.path.stem}-{name}"))


def check_resettable(model: nn.Module) -> None:
    """Raises InputError for a module that owns parameters and cannot draw new ones."""
    for name, module in model.named_modules():
        if module._parameters and not callable(getattr(module, "reset_parameters", None)):
            raise InputError(
                f"lottery: reinit draws new weights with reset_parameters(), and {name or 'the model'} "
                f"({type(module).__name__}) has parameters but no such method; add one, or leave reinit out"
            )


def reset(model: nn.Module, seed: int) -> None:
    """Draw all parameters again, as each module does when it is made; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]
