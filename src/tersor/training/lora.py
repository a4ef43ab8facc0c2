"""LoRA, QLoRA and DoRA: train two thin factors beside every linear weight, and leave the weights alone.

    y = W x + alpha / rank * B (A x)

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) keeps W as it is; QLoRA (Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314) packs it, and adapts every linear layer of the blocks; DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353) trains the length of every row of `W + B A` apart from its direction. B starts at
zero; or both factors start as the largest components of W, which W loses (PiSSA, Meng et al. 2024,
https://arxiv.org/abs/2404.02948), or as those of what packing W lost, as its inputs see it (EoRA, Liu et al. 2024,
https://arxiv.org/abs/2410.21271).

The layers are peft's, and so are the files (adapters.py).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tersor.calibration.blocks import find_blocks
from tersor.calibration.plan import survey
from tersor.calibration.walk import SiteObserver, walk
from tersor.checkpoint.adapters import (
    ADAPTER,
    Adapted,
    adapted_layers,
    dequantized,
    import_peft,
    put_in,
    state_of,
    to_bitsandbytes,
)
from tersor.core.errors import InputError, UnknownName
from tersor.core.progress import Progress, silent
from tersor.methods.stats import Stats
from tersor.methods.svd import principal_components
from tersor.nn.copies import copy_but_sites
from tersor.nn.packed import PackedLinear
from tersor.nn.sites import Site, find_sites, is_linear, is_transposed_linear
from tersor.schemes.assignment import canonical_name
from tersor.schemes.scheme import KEEP, parse_rule
from tersor.steps.preview import Preview
from tersor.steps.step_visitor import CURVATURE, Calibration
from tersor.steps.weights import WeightsStep
from tersor.steps.weights_run import WeightsRun
from tersor.tasks.contract import Task
from tersor.training.finetune import task_loss
from tersor.training.job import Job
from tersor.training.loop import Curve, train
from tersor.training.merge import merge
from tersor.training.settings import TrainingStep, check_trainable

DAMPING = 0.01  # of the second moment of a site's inputs, where EoRA weighs what packing lost by it


class LoraStep(TrainingStep):
    """Recipe step `lora`: train adapters, then merge them into the weights beside them (merge.py).

    Attributes:
        rank: columns of B and rows of A.
        alpha: `alpha / rank` scales what the adapter adds.
        dropout: of the adapter's input.
        dora: train the lengths of the weight's rows, too.
        init: `zero`, `pissa` (of float weights only) or `eora` (of packed weights only).
        base: a scheme that the linear layers of the blocks are packed with beforehand; `keep`: they stay as they are,
            which after a weights step means packed.
        targets: which linear layers get an adapter: all those of the `blocks`, the `usual` ones of the architecture as
            peft lists them, or names, of which the last parts count.
        modules_to_save: names of modules that are trained whole and saved with the adapter; a classifier's head is,
            unasked.
        runs_on: what multiplies with an nf4 base: tersor, or bitsandbytes, which is quicker on a GPU; `auto` takes it
            there if it is installed.
    """

    step: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0, ge=0, lt=1)
    dora: bool = False
    init: Literal["zero", "pissa", "eora"] = "zero"
    base: str = KEEP
    targets: Literal["blocks", "usual"] | tuple[str, ...] = "blocks"
    modules_to_save: tuple[str, ...] = ()
    runs_on: Literal["auto", "tersor", "bitsandbytes"] = "auto"
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)

    @field_validator("base")
    @classmethod
    def base_exists(cls, text: str) -> str:
        return canonical_name(text)

    def check(self, preview: Preview) -> None:
        super().check(preview)
        check_lora(preview.model, self)

    def run(self, job: Job) -> None:
        """Train adapters and merge them. Raises what `train_adapter` and `merge` raise."""
        adapted, curve = train_adapter(job, self)
        adapter = adapted.adapter
        job.model = merge(adapted.without(), adapter, job.task, seed=job.seed, progress=job.progress)
        job.masks.apply(job.model)
        job.curves.append(curve)


def train_adapter(job: Job, step: LoraStep) -> tuple[Adapted, Curve]:
    """Pack the base, put adapters in, and train them. `job.model` is changed in place.

    Raises:
        MissingExtra: without peft.
        InputError: no layer to adapt, or an init that does not go with the base.
        DataError: the task has no train split.
    """
    task = check_trainable(job.task, step.step)
    adapted = adapt(job.model, step, task, seed=job.seed, progress=job.progress)
    objective = task_loss(task)
    curve = train(
        adapted.model, task, objective, step, name=step.step, seed=job.seed, masks=job.masks, journal=job.journal,
        progress=job.progress,
    )  # fmt: skip
    return adapted, curve


def adapt(
    model: nn.Module, step: LoraStep, task: Task | None = None, *, seed: int = 0, progress: Progress = silent
) -> Adapted:
    """Pack what `step.base` says and put adapters in, in place; all else is frozen. Raises as `train_adapter`."""
    targets = check_lora(model, step)
    before = pack_base(model, step, task, seed, progress)
    config = adapter_config(model, step, targets)
    packed = to_bitsandbytes(model, step.runs_on)
    adapted = put_in(model, config, seed=seed)
    start = state_of(adapted.peft) if step.init == "pissa" else None
    if before is not None:
        start_at_losses(model, before, task, seed)
    return replace(adapted, packed=packed, start=start)


# What is adapted.


def linear_sites(model: nn.Module) -> list[Site]:
    """The sites that an adapter can stand beside: plain linear maps with a weight of their own."""
    sites = [site for site in find_sites(model) if site.kind == "linear" and len(site.owners) == 1]
    modules = {site: model.get_submodule(site.owners[0].module) for site in sites}
    return [site for site, module in modules.items() if is_linear(module) or isinstance(module, PackedLinear)]


def block_sites(model: nn.Module) -> list[Site]:
    """The linear sites inside the blocks; all of them in a model without blocks."""
    sites, blocks = linear_sites(model), find_blocks(model)
    inside = [s for s in sites if any(s.owners[0].module.startswith(f"{block}.") for block in blocks)]
    return inside or sites


def targets_of(model: nn.Module, step: LoraStep) -> list[str]:
    """The modules that get an adapter. Raises InputError or UnknownName where there is none."""
    if step.targets == "blocks":
        names = [site.owners[0].module for site in block_sites(model)]
        if not names:
            raise InputError(f"lora: {type(model).__name__} has no linear layer of its own to adapt")
        return names
    sites = linear_sites(model)
    wanted = usual_targets(model) if step.targets == "usual" else step.targets
    last_parts = sorted({site.owners[0].module.rpartition(".")[2] for site in sites})
    for name in wanted:
        if not any(ends_with(site.owners[0].module, name) for site in sites):
            raise UnknownName("linear layer", name, last_parts)
    return [s.owners[0].module for s in sites if any(ends_with(s.owners[0].module, name) for name in wanted)]


def usual_targets(model: nn.Module) -> list[str]:
    """The layers that peft adapts in this architecture by default."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    kind = getattr(getattr(model, "config", None), "model_type", "")
    if not isinstance(TABLE.get(kind), list):
        raise UnknownName("architecture with usual targets", kind, sorted(TABLE), see="use targets: blocks, or names")
    return list(TABLE[kind])


def ends_with(path: str, name: str) -> bool:
    """True if the last parts of a path are `name`.

    >>> ends_with("layers.0.q_proj", "q_proj"), ends_with("layers.0.mq_proj", "q_proj")
    (True, False)
    """
    return path == name or path.endswith(f".{name}")


def short_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """The last parts of the names if they name nothing else in the model, as peft's configs are usually written."""
    names = sorted(names)
    short = sorted({name.rpartition(".")[2] for name in names})
    found = [n for n, module in model.named_modules() if any(ends_with(n, part) for part in short)]
    return short if sorted(found) == names else names


TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def adapter_config(model: nn.Module, step: LoraStep, targets: list[str]) -> Any:
    """peft's LoraConfig. Raises UnknownName for a module to save that is not there."""
    from peft import LoraConfig

    names = [name for name, _ in model.named_modules() if name]
    for wanted in step.modules_to_save:
        if not any(ends_with(name, wanted) for name in names):
            raise UnknownName("module to save", wanted, sorted({name.rpartition(".")[2] for name in names}))
    kind = type(model).__name__
    return LoraConfig(
        r=step.rank,
        lora_alpha=int(step.alpha) if step.alpha == int(step.alpha) else step.alpha,  # type: ignore[arg-type]
        lora_dropout=step.dropout,
        use_dora=step.dora,
        init_lora_weights="pissa" if step.init == "pissa" else True,
        target_modules=short_names(targets, model),
        modules_to_save=list(step.modules_to_save) or None,
        task_type=next((value for ending, value in TASK_TYPES.items() if kind.endswith(ending)), None),
        fan_in_fan_out=any(is_transposed(model.get_submodule(name)) for name in targets),
    )


def is_transposed(module: nn.Module) -> bool:
    """True if a layer's float weight is `[in, out]`, as that of Hugging Face's Conv1D."""
    if isinstance(module, PackedLinear):
        return module.packed.fold.view == "transposed"
    return is_transposed_linear(module)


def check_lora(model: nn.Module, step: LoraStep) -> list[str]:
    """Before any work: the modules that get an adapter. Raises MissingExtra, UnknownName or InputError."""
    import_peft()
    targets = targets_of(model, step)
    check_start(model, step, targets)
    return targets


def check_start(model: nn.Module, step: LoraStep, targets: list[str]) -> None:
    """Raises InputError where the start of the factors does not go with the weights beside them."""
    if step.init == "zero":
        return
    if step.dora:
        raise InputError(f"lora: init={step.init} and dora=true do not go together; use init=zero")
    if step.init == "eora" and step.base == KEEP:
        raise InputError("lora: init=eora repairs what packing loses, and base is keep; add base=nf4, or use init=zero")
    packed = any(isinstance(model.get_submodule(name), PackedLinear) for name in targets)
    if step.init == "pissa" and (packed or step.base != KEEP):
        raise InputError(
            "lora: init=pissa takes components out of float weights, and the base is packed; use init=eora"
        )
    shapes = {site.owners[0].module: site.shape for site in find_sites(model)}
    narrow = next((name for name in targets if min(shapes[name]) < step.rank), None)
    if narrow is not None:
        raise InputError(f"lora: {narrow} {shapes[narrow]} has no {step.rank} components; use a smaller rank")


# What the base is.


def pack_base(model: nn.Module, step: LoraStep, task: Task | None, seed: int, progress: Progress) -> nn.Module | None:
    """Pack the linear layers of the blocks in place. The model as it was before that, where EoRA needs it."""
    if step.base == KEEP:
        return None
    before = copy_but_sites(model) if step.init == "eora" else None
    sites = {site.name: model.get_submodule(site.owners[0].module) for site in block_sites(model)}
    rules = {name: step.base for name, module in sites.items() if not isinstance(module, PackedLinear)}
    if not rules:
        raise InputError(f"lora: base={step.base} finds no float linear layer to pack; leave base out")
    scheme = parse_rule(step.base)
    assert scheme is not None
    # The curvature takes a gradient of every weight at once, which is what QLoRA has no memory for.
    needed = task if scheme.method.needs - CURVATURE or scheme.activation else None
    WeightsRun(model, WeightsStep(scheme=KEEP, rules=rules), Calibration(needed, seed=seed, progress=progress)).run()
    return before


@torch.no_grad()
def start_at_losses(model: nn.Module, before: nn.Module, task: Task | None, seed: int) -> None:
    """EoRA: let every adapter begin as the largest components of what packing lost beside it, weighed by the second
    moment of its inputs. Without a task all inputs weigh the same."""
    moments = second_moments(before, task, seed) if task is not None else {}
    sites = {site.owners[0].module: site for site in find_sites(before)}
    for name, layer in adapted_layers(model).items():
        base, factors = layer.get_base_layer(), (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        decoded = base.packed.matrix() if isinstance(base, PackedLinear) else dequantized(base)
        lost = sites[name].matrix(before) - decoded.float()
        found = principal_components(lost, Stats(second_moment=moments.get(sites[name].name)), DAMPING)
        right, left = found.right[: layer.r[ADAPTER]], found.left[:, : layer.r[ADAPTER]]
        factors[0][: len(right)] = right.to(factors[0].dtype)
        factors[1][:, : left.shape[1]] = (left / layer.scaling[ADAPTER]).to(factors[1].dtype)


def second_moments(model: nn.Module, task: Task, seed: int) -> dict[str, Tensor]:
    """`E[x x']` of the inputs of every linear layer of the blocks, by site."""
    moments: dict[str, Tensor] = {}

    def note(site: Site, stats: Stats) -> None:
        if stats.second_moment is not None:
            moments[site.name] = stats.second_moment

    walk(survey(model, task, block_sites(model)), SiteObserver(frozenset({"second_moment"}), note), seed=seed)
    return moments
