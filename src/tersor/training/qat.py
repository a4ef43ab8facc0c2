"""Quantization-aware training: train the very model that will be packed.

Weights and inputs take the values of their formats in every forward pass (Jacob et al. 2017,
https://arxiv.org/abs/1712.05877), with step sizes that are learned (fake_quant.py). What comes out is packed with the
scales of the last step, and gives the numbers of training. The teacher is the original itself: its outputs say more
than labels do, and need none (Mishra and Marr 2017, https://arxiv.org/abs/1711.05852).

The model runs without dropout. Batch norms take statistics from what is trained on until they are frozen (norms.py); a
folded one (transform fold-bn) is frozen from the first.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn
from torch.nn.utils import parametrize

from tersor.activations.quantizers import Activation
from tersor.checkpoint.layout import packed_sites
from tersor.core.errors import FormatError, InputError
from tersor.formats.contract import Encoded, Params
from tersor.nn.copies import copy_but_sites
from tersor.nn.packed import input_of, packed_weight, with_input
from tersor.nn.sites import Site, find_sites, leave_fused_path
from tersor.schemes.assignment import Assignment
from tersor.schemes.scheme import Scheme, parse_rule
from tersor.steps.preview import Preview
from tersor.steps.site_report import SiteReport
from tersor.steps.step_visitor import Calibration
from tersor.steps.weights import WeightsStep
from tersor.steps.weights_run import WeightsRun
from tersor.tasks.inputs import device_of
from tersor.training.fake_quant import FakeInput, FakeWeight
from tersor.training.imitation import imitation
from tersor.training.job import Job
from tersor.training.loop import train
from tersor.training.masks import Masks
from tersor.training.norms import Norms
from tersor.training.settings import TrainingStep, check_trainable

INPUT = "input_quantizer"  # as a packed module has it


class QatStep(TrainingStep, Assignment):
    """Recipe step `qat`: train with quantized weights and inputs, then pack.

    `scheme`, `rules` and `exclude` are those of a weights step, and training begins with what that step would have
    made: its scales, the ranges of static inputs over the calibration split, and, where a method moves the weights
    (`gptq`), the weights it chose. Sites that are kept are trained in float.

    Attributes:
        alpha: the labels' share of the loss; at 0 no label is needed.
        temperature: that softens the original's predictions and the model's.
        scale_learning_rate: of step sizes and zero points, relative to their own size; None: `learning_rate`.
        freeze_norms: the share of the steps after which batch norms keep their statistics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["qat"] = "qat"
    alpha: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    scale_learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    freeze_norms: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def scales_can_be_learned(self) -> "QatStep":
        schemes = [scheme for text in (self.scheme, *self.rules.values()) if (scheme := parse_rule(text))]
        for scheme in schemes:
            if scheme.format.learnable_range is None:
                raise ValueError(
                    f"qat learns the scales of integers and fp8, not of {scheme.format.name}; use int4-g32"
                )
        if not schemes:
            raise ValueError("no scheme: say what the model shall be packed in, such as scheme: int4/int8-static")
        return self

    def check(self, preview: Preview) -> None:
        super().check(preview)
        work = {site: scheme for site, scheme in self.assign(find_sites(preview.model)) if scheme is not None}
        check_schemes(work, preview.packed, preview.pruned)
        preview.packed |= {site.name for site in work}

    def run(self, job: Job) -> None:
        """Train the job's model and pack it. Raises FormatError for a site that cannot be trained in its scheme, and
        what `train` raises."""
        task = check_trainable(job.task, self.step)
        work = {site: scheme for site, scheme in self.assign(find_sites(job.model)) if scheme is not None}
        check_sites(job.model, work, job.masks)
        job.masks.apply(job.model)
        fakes = Fakes.put(job.model, work, beginning(job, self))
        norms = Norms(job.model, self.freeze_norms, self.gradient_checkpointing)
        came_from = device_of(job.teacher)
        try:
            curve = train(
                job.model,
                task,
                norms.watched(imitation(task, job.teacher, self.alpha, self.temperature)),
                self,
                name=self.step,
                seed=job.seed,
                groups=groups(job.model, self),
                masks=job.masks,
                on_step=norms.on_step,
                journal=job.journal,
                progress=job.progress,
            )
        finally:
            job.teacher.to(came_from)
            norms.release()
        job.curves.append(curve)
        job.reports |= fakes.pack(job.model)


def check_sites(model: nn.Module, work: dict[Site, Scheme], masks: Masks) -> None:
    """Raises FormatError for a site that is packed already, or pruned where its format has no exact zero."""
    owners = {site: (model.get_submodule(site.owners[0].module), site.owners[0].parameter) for site in work}
    check_schemes(work, [site.name for site in work if packed_weight(*owners[site]) is not None], masks.masks)


def check_schemes(work: dict[Site, Scheme], packed: Collection[str], pruned: Collection[str]) -> None:
    """Raises FormatError for a site of these that are packed already, or pruned where its format has no exact zero."""
    if not work:
        raise InputError("qat: every site is kept; give a scheme or rules, or use step finetune")
    for site, scheme in work.items():
        levels = scheme.format.learnable_range
        assert levels is not None
        if site.name in packed:
            raise FormatError(
                f"{site.name}: is packed already, and qat trains float weights; let qat come before the weights step, "
                f"or exclude it with exclude: ['{site.name}']"
            )
        if site.name in pruned and levels.zero_point is None:
            plain = scheme.format.name.removesuffix("-asym")
            raise FormatError(
                f"{site.name}: an earlier step pruned it, and {scheme.format.name} has no exact zero; use {plain}"
            )
        problem = scheme.format.why_not(site.shape)
        if problem:
            raise FormatError(f"{scheme.format.name}: {site.name} {problem}")


class PlannedSite(NamedTuple):
    """Initial quantization of a layer, before QAT."""

    encoded: Encoded
    activation: Activation | None


def beginning(job: Job, step: QatStep) -> dict[str, PlannedSite]:
    """The initial quantization of each site, as a weights step of this scheme chooses it.

    The inputs of recurrent layers are trained in float, and stay so.
    """
    packed = copy_but_sites(job.model)
    weights = WeightsStep(scheme=step.scheme, rules=step.rules, exclude=step.exclude, cpu=step.cpu)
    WeightsRun(packed, weights, Calibration(job.task, seed=job.seed, progress=job.progress)).run()
    return {
        site.name: PlannedSite(
            weight.encoded, None if quantizer is None or site.kind == "rnn" else quantizer.activation
        )
        for site, weight, quantizer in packed_sites(packed)
    }


@dataclass
class Fakes:
    """The quantizers that stand in a model while it is trained."""

    work: dict[Site, Scheme]
    weights: dict[str, FakeWeight] = field(default_factory=dict)
    inputs: dict[str, FakeInput] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)

    @classmethod
    def put(cls, model: nn.Module, work: dict[Site, Scheme], begun: dict[str, PlannedSite]) -> "Fakes":
        """Quantize weights and inputs of a float model as they begin. A weight that its method moved begins where it
        is now; one that was only rounded stays in float."""
        fakes = cls(work)
        for site in work:
            encoded, activation = begun[site.name]
            weight, decoded = site.weight(model), encoded.decode()
            scales: Params = {name: encoded.parts[name] for name in ("scale", "zero_point") if name in encoded.parts}
            if not torch.equal(encoded.format.fake_quantize(site.matrix(model), scales), decoded):
                weight.data = site.fold.unfold(decoded).to(weight.dtype)
            fakes.weights[site.name] = FakeWeight(encoded, site.fold).to(weight.device)
            if activation is not None:
                fakes.inputs[site.name] = FakeInput(activation).to(weight.device)
            for module, name in fakes.places(model, site):
                parametrize.register_parametrization(module, name, fakes.weights[site.name])
                if site.name in fakes.inputs:
                    module.add_module(INPUT, fakes.inputs[site.name])
                    fakes.hooks.append(module.register_forward_pre_hook(quantize_input, with_kwargs=True))
                if isinstance(module, nn.RNNBase):
                    fakes.hooks.append(module.register_forward_pre_hook(gather_weights))
        leave_fused_path(model)
        return fakes

    def pack(self, model: nn.Module) -> dict[str, SiteReport]:
        """Replace the fake quantizers by the packed weights and input quantizers that they stand for."""
        reports = {}
        for hook in self.hooks:
            hook.remove()
        for site in self.work:  # all before the first is packed: packing changes a module's class, and so does this
            for module, name in self.places(model, site):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for site, scheme in self.work.items():
            fake, inputs = self.weights[site.name], self.inputs.get(site.name)
            weight = site.matrix(model)
            encoded = fake.encode(site.weight(model))
            activation = inputs.activation() if inputs is not None else None
            site.replace(model, encoded, activation)
            reports[site.name] = SiteReport.of(site, scheme, encoded, activation, weight)
        return reports

    @staticmethod
    def places(model: nn.Module, site: Site) -> Iterator[tuple[nn.Module, str]]:
        """The modules that use a weight, each once."""
        found = {(id(model.get_submodule(place.module)), place.parameter): place for place in site.owners}
        for place in found.values():
            yield model.get_submodule(place.module), place.parameter


def quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a module runs: its input as it will be quantized."""
    return with_input(args, kwargs, module.get_submodule(INPUT)(input_of(args, kwargs)))


def gather_weights(module: nn.RNNBase, args: object) -> None:
    """Before a recurrent module runs: it keeps a list of its weights, which knows nothing of parametrizations."""
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def groups(model: nn.Module, step: QatStep) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, biases and norms without, and the scales at their own rate."""
    fakes = [module for module in model.modules() if isinstance(module, FakeWeight | FakeInput)]
    scales = [parameter for fake in fakes for parameter in fake.parameters(recurse=False)]
    known = {id(parameter) for parameter in scales}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    found = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": step.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "lr": step.scale_learning_rate or step.learning_rate},
    ]
    return [group for group in found if group["params"]]
