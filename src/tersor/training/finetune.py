"""Train on the task's own labels."""

from typing import Any, Literal

from torch import Tensor, nn

from tersor.tasks.contract import TrainableTask
from tersor.training.job import Job
from tersor.training.loop import train
from tersor.training.settings import TrainingStep, check_trainable


class FinetuneStep(TrainingStep):
    """Recipe step `finetune`: lower the task's loss over every parameter that is not packed.

    After a weights step that leaves the biases, norms and kept weights; masks of pruning steps are held.
    """

    step: Literal["finetune"] = "finetune"

    def run(self, job: Job) -> None:
        """Train the job's model. Raises what `train` raises."""
        task = check_trainable(job.task, self.step)
        curve = train(
            job.model,
            task,
            task_loss(task),
            self,
            name=self.step,
            seed=job.seed,
            masks=job.masks,
            journal=job.journal,
            progress=job.progress,
        )
        job.curves.append(curve)


def task_loss(task: TrainableTask) -> Any:
    """The task's loss as an objective."""

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return task.loss(task.forward(model, batch), batch)

    return objective
