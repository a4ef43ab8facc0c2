"""The loss that keeps a model's outputs close to those of its original.

    L = alpha CE + (1 - alpha) T^2 KL(original || model)

Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531. Where the task gives embeddings or values, their
squared distance stands in the place of the KL. With alpha 0 no label is needed.
"""

from typing import Any

from torch import Tensor, nn

from tersor.tasks.contract import TrainableTask
from tersor.tasks.inputs import scoring
from tersor.training.loop import Objective
from tersor.training.losses import kd, mse
from tersor.training.teacher_cache import predictions


def imitation(task: TrainableTask, original: nn.Module, alpha: float = 0.0, temperature: float = 1.0) -> Objective:
    """The objective: the distance of a batch's outputs from the original's, with a share `alpha` of the task's loss."""

    def objective(model: nn.Module, batch: Any) -> Tensor:
        output = task.forward(model, batch)
        labelled = alpha * task.loss(output, batch) if alpha else output.new_zeros(())
        if alpha == 1:
            return labelled
        original.to(output.device)
        with scoring(original):
            original_output = task.forward(original, batch)
        pair = predictions(output, batch), predictions(original_output, batch)
        distances = kd(*pair, temperature) if task.output == "logits" else mse(*pair)
        return labelled + (1 - alpha) * distances.mean()

    return objective
