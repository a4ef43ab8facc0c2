"""Distillation: a student is trained on a teacher's outputs, with or without labels.

    L = alpha CE + (1 - alpha) T^2 KL(teacher || student) + hidden MSE + relation KL

Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531; the other losses and their papers are in losses.py,
what looks inside the models in features.py. Projections between unlike widths are trained along and then thrown away.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from tersor.checkpoint.manifest import MANIFEST, read_manifest
from tersor.checkpoint.open import open_model
from tersor.core.errors import InputError, UnknownName
from tersor.core.scratch import scratch_folder
from tersor.steps.preview import Preview
from tersor.tasks.classification import Classification
from tersor.tasks.contract import TrainableTask
from tersor.tasks.inputs import Batch, device_of, scoring
from tersor.training.architectures import architecture_of
from tersor.training.features import Seen, hidden_loss, pairs_of_blocks, pairs_of_projections, relation_loss, watching
from tersor.training.job import Job
from tersor.training.loop import start, train
from tersor.training.losses import cosine, dkd, kd, mse, skew_kl, skew_reverse_kl, top_and_tail
from tersor.training.settings import TrainingStep, check_trainable
from tersor.training.teacher_cache import Answer, TeacherCache, padding_mask, predictions

Loss = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # student, teacher, target classes, the step: one per prediction

LOSSES: dict[str, Loss] = {
    "kd": lambda student, teacher, target, step: kd(student, teacher, step.temperature),
    "dkd": lambda student, teacher, target, step: dkd(student, teacher, target, step.temperature, step.non_target),
    "skew-kl": lambda student, teacher, target, step: skew_kl(student, teacher, step.temperature, step.skew),
    "skew-reverse-kl": lambda student, teacher, target, step: skew_reverse_kl(
        student, teacher, step.temperature, step.skew
    ),
    "mse": lambda student, teacher, target, step: mse(student, teacher),
    "cosine": lambda student, teacher, target, step: cosine(student, teacher),
}
OF_PROBABILITIES = ("kd", "dkd", "skew-kl", "skew-reverse-kl")
USUAL = {"logits": "kd", "embedding": "mse", "values": "mse"}  # by what the task's forward gives


class DistilStep(TrainingStep):
    """Recipe step `distil`: train the model to give a teacher's outputs.

    Attributes:
        teacher: a Hugging Face folder, an artifact, or a factory; None: what the recipe was given, or, after a
            `student` step, the model that the student was cut from.
        teacher_weights: of a teacher that is `package.module:factory`: a safetensors file, or an artifact.
        alpha: the labels' share of the loss; at 0 no label is needed.
        temperature: that softens both sides; 1 for language models, more where the teacher is very sure.
        loss: one of LOSSES; None: `kd` for logits, `mse` for embeddings, which have unit length.
        skew: of the skewed losses, the share mixed in.
        non_target: of `dkd`, the weight of what the teacher says about the classes that are not the target.
        hidden: weight of the hidden states' squared error.
        relation: weight of the attention relations' KL, in the last blocks.
        num_relation_heads: parts that queries, keys and values are cut into for it; None: as many as the teacher has
            heads (of keys).
        cache: keep the teacher's outputs on disk instead of running it in every epoch.
        top_k: of a cached prediction, how many classes are kept apart; None: all.
    """

    step: Literal["distil"] = "distil"
    teacher: str | None = None
    teacher_weights: str | None = None
    alpha: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    loss: str | None = None
    skew: float = Field(default=0.1, gt=0, lt=1)
    non_target: float = Field(default=8.0, ge=0, allow_inf_nan=False)
    hidden: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relation: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    num_relation_heads: int | None = Field(default=None, ge=1)
    cache: bool = False
    top_k: int | None = Field(default=None, ge=1)

    @field_validator("loss")
    @classmethod
    def loss_exists(cls, name: str | None) -> str | None:
        if name is not None and name not in LOSSES:
            raise ValueError(str(UnknownName("loss", name, LOSSES)))
        return name

    @model_validator(mode="after")
    def goes_together(self) -> "DistilStep":
        if self.cache and (self.hidden or self.relation):
            raise ValueError("cache keeps the teacher's outputs alone; with hidden or relation use cache: false")
        if self.top_k is not None and not self.cache:
            raise ValueError(f"top_k is {self.top_k}, and says what cache: true keeps; add cache: true or leave it out")
        if self.top_k is not None and self.loss in ("mse", "cosine"):
            raise ValueError(f"top_k keeps probabilities, and loss {self.loss} compares all logits; leave top_k out")
        return self

    def run(self, job: Job) -> None:
        """Train the job's model. Raises InputError where it does not go with its teacher, and what `train` raises."""
        task = check_trainable(job.task, self.step)
        teacher = self.teacher_of(job)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            distillation = Distillation(self, task, job.model, teacher)
        came_from = device_of(teacher)
        with self.answers(job, task, teacher) as distillation.cache:
            curve = train(
                job.model,
                task,
                distillation,
                self,
                name=self.step,
                seed=job.seed,
                masks=job.masks,
                journal=job.journal,
                progress=job.progress,
            )
        teacher.to(came_from)
        job.curves.append(curve)

    def check(self, preview: Preview) -> None:
        super().check(preview)
        self.check_teacher()

    def teacher_of(self, job: Job) -> nn.Module:
        """The teacher: opened from the folder that the step names, or else the job's."""
        if self.teacher is None:
            return job.teacher
        self.check_teacher()
        return open_model(self.teacher, weights=Path(self.teacher_weights) if self.teacher_weights else None).model

    def check_teacher(self) -> None:
        """Raises InputError where there is no such teacher, before anything is trained."""
        if self.teacher is None:
            return
        folder = Path(self.teacher).expanduser()
        if not folder.is_dir():
            if ":" not in self.teacher:
                raise InputError(
                    f"teacher: {self.teacher} is no folder; give a Hugging Face folder or a tersor artifact, or "
                    f"package.module:factory with teacher_weights"
                )
            if self.teacher_weights is None or not Path(self.teacher_weights).expanduser().exists():
                raise InputError(
                    f"teacher: {self.teacher} is a factory; give its weights as teacher_weights, a safetensors file or "
                    f"an artifact, and not {self.teacher_weights}"
                )
        elif self.teacher_weights is not None:
            raise InputError(f"teacher_weights: {self.teacher} brings its own; leave {self.teacher_weights} out")
        elif (folder / MANIFEST).exists() and (factory := read_manifest(folder)["model"].get("factory")):
            raise InputError(
                f"teacher: {self.teacher} holds a custom model, and tersor runs no code that an artifact names; name "
                f"it yourself: teacher: '{factory}' with teacher_weights: {self.teacher}"
            )

    @contextmanager
    def answers(self, job: Job, task: TrainableTask, teacher: nn.Module) -> Iterator[TeacherCache | None]:
        """The teacher's outputs on disk: beside the job's journal, or in a temporary folder."""
        if not self.cache:
            yield None
            return
        if getattr(task, "augment", ()):
            raise InputError(
                "cache: the task augments its images, and the teacher must see what the student sees; use cache: "
                "false, or the task without augment"
            )
        with scratch_folder() as temporary:
            folder = temporary if job.journal is None else job.journal.path.with_suffix(".teacher")
            cache = TeacherCache(folder, self.key_of(task, teacher), self.top_k, self.temperature)
            accelerator = start(self)
            teacher.to(accelerator.device)
            with accelerator.main_process_first(), accelerator.autocast():
                cache.fill(task, teacher, self.batch_size, job.progress)
            yield cache

    def key_of(self, task: TrainableTask, teacher: nn.Module) -> str:
        """A hash of all that the teacher's outputs and their order depend on."""
        batch = next(iter(task.epoch(0, self.batch_size)))
        inputs = batch.inputs.items() if isinstance(batch, Batch) else ()
        sums = [
            f"{name} {values.detach().double().sum().item()}" for name, values in (*teacher.named_parameters(), *inputs)
        ]
        fields = self.top_k, self.temperature, self.batch_size, self.precision
        return hashlib.sha256("\0".join([task.fingerprint, task.description, repr(fields), *sums]).encode()).hexdigest()


class Distillation(nn.Module):
    """The objective, with the projections between unlike widths as its parameters.

    Attributes:
        cache: what the teacher says; None: it is asked.
    """

    def __init__(self, step: DistilStep, task: TrainableTask, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.step, self.task = step, task
        self.cache: TeacherCache | None = None
        self.models = (student, teacher)  # in a tuple: they are no part of this module
        self.loss = LOSSES[loss_of(step, task)]
        self.blocks = pairs_of_blocks(student, teacher) if step.hidden else []
        self.relations = pairs_of_projections(student, teacher) if step.relation else []
        self.num_heads = (step.num_relation_heads or num_key_heads(teacher)) if step.relation else 0
        self.project: nn.Module = nn.Identity()
        self.project_hidden = nn.ModuleList()
        self.check()

    def check(self) -> None:
        """Run both on the first batch: whatever does not go together shows now. Makes the projections."""
        student, teacher = self.models
        check_names(student, teacher, self.task)
        batch = next(iter(self.task.epoch(0, self.step.batch_size)))
        with scoring(student), watching(student, self.watched(0)) as ours:
            output = self.task.forward(student, batch)
        answer, theirs = self.ask(batch)
        check_outputs(output, answer.outputs, self.task)
        if self.task.output != "logits":
            self.project = projection(output.shape[-1], answer.outputs.shape[-1])
        for name, other in self.blocks:
            self.project_hidden.append(projection(ours[name].shape[-1], theirs[other].shape[-1]))
        if self.step.alpha:
            self.task.loss(output, batch)
        for term in self.inside(batch, ours, theirs):
            term.item()

    def watched(self, side: int) -> list[str]:
        """Modules of the student (0) or the teacher (1) whose outputs are compared."""
        return [pair[side] for pair in (*self.blocks, *self.relations)]

    def ask(self, batch: Any) -> tuple[Answer, Seen]:
        """Runs the teacher; returns logits and hidden states."""
        _, teacher = self.models
        with scoring(teacher), watching(teacher, self.watched(1)) as seen:
            return Answer(predictions(self.task.forward(teacher, batch), batch)), seen

    def forward(self, model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """The loss of a batch."""
        student, teacher = self.models
        with watching(student, self.watched(0)) as ours:
            output = self.task.forward(model, batch)
        if self.cache is not None:
            answer, theirs = self.cache.read(batch).to(output.device), Seen()
        else:
            teacher.to(output.device)
            answer, theirs = self.ask(batch)
        alpha = self.step.alpha
        total = alpha * self.task.loss(output, batch) if alpha else output.new_zeros((), dtype=torch.float32)
        if alpha < 1:
            total = total + (1 - alpha) * self.compare(predictions(output, batch), answer, batch).mean()
        return sum(self.inside(batch, ours, theirs), total)

    def compare(self, outputs: Float[Tensor, "prediction class_"], answer: Answer, batch: Any) -> Tensor:
        """The distillation loss of each prediction, `[prediction]`."""
        if self.task.output != "logits":
            outputs = self.project(outputs)
            outputs = normalize(outputs, dim=-1) if self.task.output == "embedding" else outputs
        target = targets(self.task, batch, answer)
        if answer.classes is not None:
            outputs = top_and_tail(outputs, answer.classes, self.step.temperature)
        return self.loss(outputs, answer.outputs, target, self.step)

    def inside(self, batch: Any, ours: Seen, theirs: Seen) -> Iterator[Tensor]:
        """The weighted losses of hidden states and relations."""
        for (name, other), project in zip(self.blocks, self.project_hidden, strict=True):
            loss = hidden_loss(project(ours[name]), theirs[other], padding_mask(batch, ours[name]))
            yield self.step.hidden / len(self.blocks) * loss
        for name, other in self.relations:
            mask = padding_mask(batch, ours[name])
            loss = relation_loss(ours[name], theirs[other], self.num_heads, mask)
            yield self.step.relation / len(self.relations) * loss


def loss_of(step: DistilStep, task: TrainableTask) -> str:
    """The loss's name. Raises InputError where it does not fit what the task gives."""
    name = step.loss or USUAL[task.output]
    if name in OF_PROBABILITIES and task.output != "logits":
        raise InputError(f"loss {name} compares probabilities, and task '{task.name}' gives {task.output}; use mse")
    if step.top_k is not None and name not in OF_PROBABILITIES:
        raise InputError(f"top_k keeps probabilities, and task '{task.name}' gives {task.output}; leave top_k out")
    return name


def targets(task: TrainableTask, batch: Any, answer: Answer) -> Int[Tensor, " prediction"]:
    """The labels of a batch; without labels, the classes that the teacher finds most probable."""
    outputs = answer.outputs if answer.classes is None else answer.outputs[:, :-1]
    likely = outputs.argmax(-1)
    if not (isinstance(task, Classification) and isinstance(batch, Batch)):
        return likely
    labels = torch.from_numpy(task.labels[batch.rows]).to(outputs.device)
    places = labels
    if answer.classes is not None:  # the place among the classes kept, else that of the rest
        found = answer.classes == labels.unsqueeze(-1)
        places = torch.where(found.any(-1), found.int().argmax(-1), answer.classes.shape[-1])
    return torch.where(labels < 0, likely, places)


def projection(width: int, wanted: int) -> nn.Module:
    """A linear map from the student's width to the teacher's."""
    if width == wanted:
        return nn.Identity()
    linear = nn.Linear(width, wanted, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear


def check_names(student: nn.Module, teacher: nn.Module, task: TrainableTask) -> None:
    """Raises InputError where the configurations tell of unlike vocabularies or class names."""
    ours, theirs = (getattr(model, "config", None) for model in (student, teacher))
    if ours is None or theirs is None:
        return
    sizes = [getattr(config, "vocab_size", None) for config in (ours, theirs)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher's vocabulary has {sizes[1]:,} tokens and the student's {sizes[0]:,}: they read different "
            f"tokens; take a teacher with the student's tokenizer"
        )
    if task.output != "logits":
        return
    names = [[str(name).lower() for _, name in sorted(config.id2label.items())] for config in (ours, theirs)]
    unnamed = any(name.startswith("label_") for name in (*names[0], *names[1]))
    if names[0] != names[1] and not unnamed and len(names[0]) == len(names[1]):
        place = next(i for i, pair in enumerate(zip(*names, strict=True)) if pair[0] != pair[1])
        raise InputError(
            f"class {place} is '{names[1][place]}' for the teacher and '{names[0][place]}' for the student; take a "
            f"teacher with the same id2label"
        )


def check_outputs(student: Tensor, teacher: Tensor, task: TrainableTask) -> None:
    """Raises InputError for logits over different classes."""
    if task.output == "logits" and student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"the teacher gives logits over {teacher.shape[-1]:,} classes and the student over {student.shape[-1]:,}; "
            f"take a teacher and a student with the same labels and the same vocabulary"
        )


def num_key_heads(model: nn.Module) -> int:
    """Heads of keys and values in the model's configuration."""
    names, config = architecture_of(model, "relation"), getattr(model, "config", None)
    return getattr(config, names.num_kv_heads or names.num_heads)
