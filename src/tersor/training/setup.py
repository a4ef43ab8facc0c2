"""Setup of a training run: an Accelerator, an optimizer, a scheduler."""

import math
from typing import Any

import torch
from torch import nn

from tersor.core.errors import InputError, MissingExtra
from tersor.training.settings import TrainingStep

PRECISIONS = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


def start(settings: TrainingStep) -> Any:
    """An Accelerator, made anew: the one of an earlier run may have had another precision."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise MissingExtra("train", "training") from None
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=PRECISIONS[settings.precision],
        gradient_accumulation_steps=settings.accumulate,
        step_scheduler_with_optimizer=False,
    )


def usual_groups(model: nn.Module, extra: nn.Module, settings: TrainingStep) -> list[dict[str, Any]]:
    """All parameters that require gradients: matrices with weight decay, biases and norms without."""
    parameters = [p for p in (*model.parameters(), *extra.parameters()) if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], settings: TrainingStep) -> torch.optim.Optimizer:
    """The optimizer by name. Raises InputError without a single parameter, or where the 8-bit one cannot run."""
    if not any(len(list(group["params"])) for group in groups):
        raise InputError("nothing to train: no parameter of the model requires gradients; train before packing weights")
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    if not torch.cuda.is_available():
        raise InputError("optimizer adamw-8bit runs on a GPU only, and there is none; use optimizer: adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MissingExtra("bitsandbytes", "optimizer adamw-8bit") from None
    return AdamW8bit(groups, lr=settings.learning_rate)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: TrainingStep, num_steps: int) -> Any:
    """The scheduler of the learning rate: warm-up, then constant, linear or cosine decay."""
    from transformers import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    return get_scheduler(name, optimizer, math.ceil(settings.warmup * num_steps), num_steps)


def checkpoint_activations(model: nn.Module) -> None:
    """Turn on activation checkpointing: activations are computed again in the backward pass, and not kept."""
    for kind in ("activation", "gradient"):  # its name in transformers 5, and before
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None:
            enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
            return
    raise InputError(f"gradient_checkpointing is for Hugging Face models, not {type(model).__name__}; leave it out")
