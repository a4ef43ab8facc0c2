"""Gradual magnitude pruning (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878).

While the model trains, the smallest weights are set to zero, more and more of them: the sparsity after a share `t` of
the ramp is `s_end + (s_start - s_end) (1 - t)^3`, fast while much is redundant and slowly at the end. Each cut is small
enough for the others to make up for, and the steps after the ramp recover what is left to recover.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from tersor.schemes.assignment import Patterns
from tersor.steps.preview import Preview
from tersor.training.imitation import imitation
from tersor.training.job import Job
from tersor.training.loop import train
from tersor.training.masks import N_OF_M, MaskChoice, Pattern, Scope, empty_sites
from tersor.training.settings import TrainingStep, check_trainable


class PruneStep(TrainingStep):
    """Recipe step `prune`: train, and meanwhile drop the smallest weights.

    Attributes:
        sparsity: the fraction of the weights that is dropped in the end; exact to one weight.
        initial_sparsity: what is dropped before the first step.
        ramp: the fraction of the steps over which the sparsity rises; the others recover. 0 drops all at once before
            the first step.
        num_prunings: in how many cuts the sparsity rises.
        scope: `global` ranks the weights of all sites together, `site` those of each by themselves.
        pattern: `2:4` and `4:8` keep half of every 4 and 8 neighbouring columns.
        rules: patterns of sites with a sparsity of their own; each such site is ranked by itself.
        exclude: patterns of sites that are not pruned.
        alpha: the share of the task's loss; the rest is the divergence from the original model's outputs (Hinton et al.
            2015), which needs no labels.
        temperature: that softens both outputs there.
    """

    step: Literal["prune"] = "prune"
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    initial_sparsity: float = Field(default=0.0, ge=0, lt=1)
    ramp: float = Field(default=0.5, ge=0, lt=1)
    num_prunings: int = Field(default=20, ge=1)
    scope: Scope = "global"
    pattern: Pattern = "unstructured"
    rules: dict[str, float] = Field(default_factory=dict)
    exclude: Patterns = ()
    alpha: float = Field(default=1.0, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def fields_go_together(self) -> Self:
        check_sparsities(self.sparsity, self.rules, self.pattern)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(f"initial_sparsity {self.initial_sparsity} is above sparsity {self.sparsity}; lower it")
        if self.patience is not None and self.ramp:
            raise ValueError(
                f"patience {self.patience} would take weights back from before they were pruned; leave it out, or "
                f"prune all at once with ramp: 0"
            )
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*self.rules, *self.exclude)

    @property
    def choice(self) -> MaskChoice:
        """The choice of the weights that are pruned."""
        return MaskChoice(self.sparsity, self.scope, self.pattern, self.rules, self.exclude)

    def check(self, preview: Preview) -> None:
        super().check(preview)
        self.choice.check(preview)

    def run(self, job: Job) -> None:
        """Prune and train the job's model; every later step holds its masks.

        Raises what `train` and `Choice.groups` raise.
        """
        task = check_trainable(job.task, self.step)
        choice = self.choice
        choice.groups(job.model)  # what is wrong with it is said before anything is done

        def on_step(step: int, num_steps: int) -> None:
            share = self.share(step, num_steps)
            if step == 0 or share != self.share(step - 1, num_steps):
                choice.tighten(job.model, job.masks, lambda end: cubic(share, self.initial_sparsity, end))

        curve = train(
            job.model,
            task,
            imitation(task, job.teacher, self.alpha, self.temperature),
            self,
            name=self.step,
            seed=job.seed,
            masks=job.masks,
            on_step=on_step,
            journal=job.journal,
            progress=job.progress,
        )
        choice.tighten(job.model, job.masks)  # nothing new, unless training broke off on the ramp
        curve.notes += empty_sites(job.masks)
        job.curves.append(curve)

    def share(self, step: int, num_steps: int) -> float:
        """The share of prunings done before this step: 0 before the first, 1 from the end of the ramp on."""
        ramp_steps = int(self.ramp * num_steps)
        return 1.0 if step >= ramp_steps else step * self.num_prunings // ramp_steps / self.num_prunings


def cubic(share: float, start: float, end: float) -> float:
    """The sparsity after a share of the ramp; `start` is at most `end`.

    >>> [round(cubic(share, 0.1, 0.9), 6) for share in (0.0, 0.5, 1.0)]
    [0.1, 0.8, 0.9]
    """
    start = min(start, end)
    return end + (start - end) * (1 - share) ** 3


def check_sparsities(sparsity: float, rules: dict[str, float], pattern: Pattern = "unstructured") -> None:
    """Raises ValueError, for pydantic to carry, unless all are fractions in [0, 1) that the pattern allows."""
    for name, value in rules.items():
        if not 0 <= value < 1:
            raise ValueError(f"rules.{name}: {value} is not a fraction; give one in [0, 1), such as 0.5")
    if pattern in N_OF_M and (sparsity != 0.5 or rules):
        given = f"rules {rules}" if rules else f"sparsity {sparsity}"
        raise ValueError(
            f"{given}: pattern {pattern} drops half of every site's weights; leave sparsity and rules out (exclude "
            f"keeps a site whole), or use pattern: unstructured"
        )
