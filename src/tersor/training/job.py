"""The state that a recipe's training step works on."""

from dataclasses import dataclass, field

from torch import nn

from tersor.core.progress import Progress, silent
from tersor.steps.site_report import SiteReport
from tersor.tasks.contract import Task
from tersor.training.journal import Journal
from tersor.training.loop import Curve
from tersor.training.masks import Masks


@dataclass
class Job:
    """A model on its way through the steps of a recipe.

    Attributes:
        model: as the steps so far have made it; a training step changes it in place or puts another here. It owns its
            parameters: nothing of `original` changes with it.
        original: as the recipe was given it. Never changed.
        teacher: who is imitated: `original`, or, after a student step, the model that the student was cut from.
        task: its train split is trained on.
        masks: which weights pruning steps have set to zero; every later step holds them there.
        journal: where the step's checkpoints go.
        curves: how each training went.
        reports: what became of the sites that were packed, by name.
    """

    model: nn.Module
    original: nn.Module
    task: Task | None
    seed: int = 0
    progress: Progress = silent
    masks: Masks = field(default_factory=Masks)
    journal: Journal | None = None
    curves: list[Curve] = field(default_factory=list)
    reports: dict[str, SiteReport] = field(default_factory=dict)
    teacher: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.teacher = self.original
