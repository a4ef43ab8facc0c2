"""The jobs of `tersor inspect`: the sites of a model and the cost of every format, and what data predicts of both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tersor.analysis.sensitivity import SCHEMES, Sensitivity
from tersor.analysis.sensitivity import sensitivity as predict_losses
from tersor.analysis.training_memory import Tokens, TrainingMemory
from tersor.analysis.training_memory import training_memory as predict_memory
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.layout import packed_sites, unpacked_tensors
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.source import Source
from tersor.core.errors import InputError
from tersor.core.progress import Events
from tersor.formats import FORMATS
from tersor.jobs.finetune import step_named
from tersor.nn.sites import find_sites
from tersor.search.cost import cost_of
from tersor.tasks import Task
from tersor.tasks.data import Data
from tersor.training import FinetuneStep, TrainingStep

SELECTION = [
    "bf16",
    *(f"int{bits}{group}" for bits in (8, 6, 5, 4, 3, 2) for group in ("", "-g32")),
    "int4-g128",
    "int4-g32-asym",
    "bitmask",
]


@dataclass(frozen=True)
class SiteRow:
    """One site: `format` is None where it is float, `tied` are the other places of its weight."""

    name: str
    kind: str
    shape: list[int]
    dtype: str
    format: str | None
    weights: int
    tied: list[str]


@dataclass(frozen=True)
class Inspected:
    """The sites of a model, the tensors beside them, and what each format would make of the sites.

    Attributes:
        file_bytes: bytes of the weights as they are.
        kept: name, shape and bytes of every tensor that belongs to no site.
        formats: for each format its bytes in a file, bits per weight, relative error, and how many sites do not fit.
    """

    model: str
    architecture: str
    file_bytes: int
    sites: list[SiteRow]
    kept: list[dict[str, Any]]
    formats: list[dict[str, Any]]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors that belong to no site."""
        return sum(row["bytes"] for row in self.kept)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "architecture": self.architecture,
            "weights_file_bytes": self.file_bytes,
            "sites": [asdict(site) for site in self.sites],
            "kept": self.kept,
            "kept_bytes": self.kept_bytes,
            "formats": self.formats,
        }


def inspect(model: ModelSpec, formats: Sequence[str] = (), events: Events = Events()) -> Inspected:
    """List the sites of a model, and measure the cost of formats at them.

    Args:
        formats: schemes; none: a selection; `all`: every format there is.

    Raises a TersorError with the way out.
    """
    source = model.open()
    sites = find_sites(source.model)
    packed = {site.name: module.format.name for site, module, _ in packed_sites(source.model)}
    parameters = {site.parameter for site in sites}
    kept = {name: each for name, each in unpacked_tensors(source.model).items() if name not in parameters}
    kept_bytes = sum(tensor.nbytes for tensor in kept.values())
    names, costs = all_or(formats) or SELECTION, []
    for done, name in enumerate(names):
        events.on_progress("measuring formats", done, len(names))
        costs.append(cost_of(name, sites, kept_bytes, source.model))
    events.on_progress("measuring formats", len(names), len(names))
    rows = [
        SiteRow(
            site.name,
            site.kind,
            list(site.shape),
            str(site.dtype).removeprefix("torch."),
            packed.get(site.name),
            site.num_weights,
            [".".join(place) for place in site.owners[1:]],
        )
        for site in sites
    ]
    others = [{"name": name, "shape": list(each.shape), "bytes": each.nbytes} for name, each in kept.items()]
    file_bytes = source.num_bytes or size_of(source.model)
    return Inspected(model.name, source.architecture, file_bytes, rows, others, costs)


def all_or(formats: Sequence[str]) -> list[str]:
    """The given formats; every format there is for `all` alone."""
    return list(FORMATS) if list(formats) == ["all"] else list(formats)


@dataclass(frozen=True)
class Predicted:
    """The loss predicted for each scheme at each layer, and the task on whose calibration split it was predicted."""

    losses: Sensitivity
    task: str


def sensitivity(
    model: ModelSpec,
    data: Data = Data(),
    formats: Sequence[str] = (),
    num_measured: int = 10,
    seed: int = 0,
    events: Events = Events(),
) -> Predicted:
    """Predict the loss of every scheme at every site, and measure some of them. Raises a TersorError."""
    if num_measured < 0:
        raise InputError(
            f"--measure {num_measured} is not a number of predictions; write for example 10, or 0 for none"
        )
    source = model.open_to_run()
    if source.kind == "artifact":
        raise InputError(f"{model.name} is a tersor artifact already; inspect the original model instead")
    task = data.open(source)
    schemes = all_or(formats) or SCHEMES
    found = predict_losses(
        source.model, task, schemes, num_measured=num_measured, seed=seed, progress=events.on_progress
    )
    return Predicted(found, task.description)


@dataclass(frozen=True)
class TrainingNeeds:
    """The predicted memory of each way to train a model, and what it was predicted for."""

    memory: dict[str, TrainingMemory]
    task: str


def training_memory(
    model: ModelSpec,
    data: Data = Data(),
    settings: Mapping[str, Any] = {},
    lora: Mapping[str, Any] = {"rank": 16},
    base: str = "nf4",
    context: int = 512,
) -> TrainingNeeds:
    """Predict the memory of training: whole, and by adapters beside float and packed weights.

    Args:
        data: without a task, texts of `context` tokens.
        settings: fields of the training steps, such as `batch_size`.
        lora: fields of the adapters.
        base: the scheme that packs the weights beside adapters.

    Raises InputError for a model or a task that cannot be trained.
    """
    if context < 2:
        raise InputError(f"--context {context} leaves no token to predict; write for example 512")
    source = model.open()
    steps = training_steps(source, settings, lora, base)
    task: Task = data.open(source) if data.task else Tokens(context)
    found = {}
    for title, step in steps.items():
        dtype = torch.float32 if isinstance(step, FinetuneStep) else None
        found[title] = predict_memory(source.model, task, step, dtype=dtype)
    return TrainingNeeds(found, task.description)


def training_steps(
    source: Source, settings: Mapping[str, Any], lora: Mapping[str, Any], base: str
) -> dict[str, TrainingStep]:
    """The training steps whose memory is predicted, by name; adapters only for an artifact, which is packed."""
    packed = source.kind == "artifact"
    steps: dict[str, TrainingStep] = {}
    for name, more in (("", {}), (", checkpointed", {"gradient_checkpointing": True})):
        if more and source.kind == "custom":
            continue
        given = {**settings, **more}
        if not packed:
            steps[f"full{name}"] = step_named("finetune", given)
        steps[f"{'packed, LoRA' if packed else 'LoRA'}{name}"] = step_named("lora", {**given, **lora})
        if not packed:
            steps[f"QLoRA, {base}{name}"] = step_named("lora", {**given, **lora, "base": base})
    return steps
