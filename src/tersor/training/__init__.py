"""Training as steps of a recipe: fine-tuning, distillation, pruning, QAT and LoRA.

`TRAINING_STEPS` is the whole list. A new one is a file with a subclass of `TrainingStep` that has a `step` name of its
own and `run(job)`, and a line here.
"""

from tersor.training.distil import DistilStep
from tersor.training.finetune import FinetuneStep
from tersor.training.job import Job
from tersor.training.loop import Curve, train
from tersor.training.lora import LoraStep
from tersor.training.lottery import LotteryStep
from tersor.training.masks import Masks
from tersor.training.prune import PruneStep
from tersor.training.qat import QatStep
from tersor.training.settings import TrainingStep
from tersor.training.student import StudentStep
from tersor.training.tune_scales import TuneScalesStep

__all__ = [
    "TRAINING_STEPS",
    "Curve",
    "DistilStep",
    "FinetuneStep",
    "Job",
    "Masks",
    "QatStep",
    "StudentStep",
    "TrainingStep",
    "TuneScalesStep",
    "train",
]

TRAINING_STEPS: dict[str, type[TrainingStep]] = {
    "finetune": FinetuneStep,
    "lora": LoraStep,
    "distil": DistilStep,
    "prune": PruneStep,
    "lottery": LotteryStep,
    "qat": QatStep,
    "tune-scales": TuneScalesStep,
}
