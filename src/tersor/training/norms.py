"""The modules that run in training mode while a model imitates its original: only those that must.

Dropout would blur what the original says, and a batch norm goes on as it ran at the end of its own training (statistics
frozen: Krishnamoorthi 2018, section 3.2.4, https://arxiv.org/abs/1806.08342).
"""

from typing import Any

from torch import Tensor, nn

from tersor.nn.connections.graph import is_batch_norm
from tersor.training.loop import Objective
from tersor.transforms.fold_bn import is_neutral


class Norms:
    """The modes of a model that is trained by an objective; a batch norm that was folded keeps its gain of one.

    Attributes:
        share: of the steps in which batch norms take statistics from the batches that are trained on; folded ones
            never do.
        checkpointed: whether activations are computed twice; Hugging Face models then run in training mode.
    """

    def __init__(self, model: nn.Module, share: float, checkpointed: bool = False):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
        self.folded = [norm for norm in norms if is_batch_norm(norm) and is_neutral(norm)]
        self.running = [norm for norm in norms if norm not in self.folded]
        self.recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        self.share, self.checkpointed, self.frozen = share, checkpointed, share == 0
        for norm in self.folded:
            norm.weight.requires_grad_(False)

    def on_step(self, done: int, num_steps: int) -> None:
        """Set the modes of the modules again, before every step of the loop."""
        self.frozen = done >= self.share * num_steps

    def watched(self, objective: Objective) -> Objective:
        """The objective of a model in these modes."""

        def watched(model: nn.Module, batch: Any) -> Tensor:
            model.train(self.checkpointed)
            for norm in [*self.folded, *self.running]:
                norm.train(norm in self.running and not self.frozen)
            for module in self.recurrent:
                module.train()  # cuDNN has no backward otherwise
            return objective(model, batch)

        return watched

    def release(self) -> None:
        """Let the folded norms be trainable again, after training."""
        for norm in self.folded:
            norm.weight.requires_grad_(True)
