"""Training that gets quality back, as steps of a recipe.

`TRAINING_STEPS` is the whole list. A new one is a file with a subclass of `TrainingStep` that has a `step` name of its
own and `run(job)`, and a line here.
"""

from tersor.training.finetune import FinetuneStep
from tersor.training.job import Job
from tersor.training.loop import Curve, train
from tersor.training.masks import Masks
from tersor.training.settings import TrainingStep

__all__ = ["TRAINING_STEPS", "Curve", "FinetuneStep", "Job", "Masks", "TrainingStep", "train"]

TRAINING_STEPS: dict[str, type[TrainingStep]] = {
    "finetune": FinetuneStep,
}
