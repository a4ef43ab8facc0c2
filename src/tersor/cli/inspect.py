"""`tersor inspect MODEL`: the sites, their shapes and sizes, what each format would make of them, and at what loss."""

from typing import Annotated, Any

import torch
import typer

from tersor.analysis.sensitivity import SCHEMES, Sensitivity
from tersor.analysis.sensitivity import sensitivity as predict
from tersor.analysis.training_memory import Tokens
from tersor.analysis.training_memory import training_memory as predict_training
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.layout import packed_sites, unpacked_tensors
from tersor.checkpoint.open import open_model
from tersor.checkpoint.source import Source
from tersor.cli import options
from tersor.cli.console import out, print_json, print_table, progress_bars
from tersor.cli.finetune import step_of
from tersor.core.errors import InputError
from tersor.formats import FORMATS
from tersor.jobs.task_choice import TaskChoice, open_task_for
from tersor.nn.sites import find_sites
from tersor.report.card import megabytes
from tersor.search.cost import cost_of
from tersor.tasks import Task
from tersor.training import FinetuneStep, TrainingStep


def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, artifact, or package.module:factory.")],
    weights: options.Weights = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Formats of the cost table; default: a selection. 'all' for every one.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Predict instead the loss of each format at each site, from data.")
    ] = False,
    measure: Annotated[
        int, typer.Option(help="With --sensitivity: how many of the predictions to check by measuring the loss.")
    ] = 10,
    training_memory: Annotated[
        bool, typer.Option("--training-memory", help="Predict instead the memory of training: whole, LoRA and QLoRA.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="With --training-memory: examples of one forward pass.")
    ] = 1,
    context: Annotated[int, typer.Option(help="With --training-memory, without --task: tokens of an example.")] = 512,
    lora: Annotated[
        list[str] | None, typer.Option(help="With --training-memory: the adapters, as tersor finetune takes them.")
    ] = None,
    base: Annotated[str, typer.Option(help="With --training-memory: what QLoRA packs the weights with.")] = "nf4",
    optimizer: Annotated[str, typer.Option(help="With --training-memory: adamw, sgd or adamw-8bit.")] = "adamw",
    task: options.TaskName = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    train: options.Train = None,
    task_option: options.TaskOption = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """List the sites of a model, what is kept, and the cost of every format."""
    if not (sensitivity or training_memory) and (task or data or calibration or task_option):
        raise InputError("inspect runs data only for --sensitivity; add it, or leave --task and --data out")
    source = open_model(model, weights=weights, dtype=options.dtype_named(dtype))
    if training_memory:
        choice = options.task_choice(task, data, calibration, task_option, train)
        steps = training_steps(source, {"batch_size": batch_size, "optimizer": optimizer}, lora or ["r=16"], base)
        show_training_memory(model, source, choice if task else None, steps, context, json)
        return
    if sensitivity:
        choice = options.task_choice(task, data, calibration, task_option)
        show_sensitivity(model, source, choice, list(FORMATS) if format == ["all"] else format, measure, seed, json)
        return
    file_bytes = source.num_bytes or size_of(source.model)
    sites = find_sites(source.model)
    packed = {site.name: module.format.name for site, module, _ in packed_sites(source.model)}
    kept = {n: t for n, t in unpacked_tensors(source.model).items() if n not in {s.parameter for s in sites}}
    kept_bytes = sum(tensor.nbytes for tensor in kept.values())
    site_rows: list[dict[str, Any]] = [
        {
            "name": site.name,
            "kind": site.kind,
            "shape": list(site.shape),
            "dtype": str(site.dtype).removeprefix("torch."),
            "format": packed.get(site.name),
            "weights": site.num_weights,
            "tied": [".".join(place) for place in site.owners[1:]],
        }
        for site in sites
    ]
    names = list(FORMATS) if format == ["all"] else format or SELECTION
    costs = []
    with progress_bars(json) as progress:
        for done, name in enumerate(names):
            progress("measuring formats", done, len(names))
            costs.append(cost_of(name, sites, kept_bytes, source.model))
    if json:
        kept_rows = [{"name": n, "shape": list(t.shape), "bytes": t.nbytes} for n, t in kept.items()]
        print_json(
            {
                "model": model,
                "architecture": source.architecture,
                "weights_file_bytes": file_bytes,
                "sites": site_rows,
                "kept": kept_rows,
                "kept_bytes": kept_bytes,
                "formats": costs,
            }
        )
        return
    num_weights = sum(site.num_weights for site in sites)
    print_table(
        f"{model}: {source.architecture}, {megabytes(file_bytes)}, {len(sites)} sites with {num_weights:,} weights",
        ["site", "kind", "shape", "dtype", "format", "weights", "share", "tied to"],
        [
            (
                row["name"],
                row["kind"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                row["format"] or "-",
                f"{row['weights']:,}",
                f"{row['weights'] / num_weights:.1%}",
                ", ".join(row["tied"]),
            )
            for row in site_rows
        ],
    )
    rows = [
        (
            c["format"],
            megabytes(c["bytes"]),
            f"{c['bits_per_weight']:.3f}",
            f"{c['relative_error']:.5f}" if c["relative_error"] is not None else "-",
            c["misfits"] or "",
        )
        for c in costs
    ]
    print_table(
        f"cost of a format at every site it fits ({megabytes(kept_bytes)} are kept as they are and counted)",
        ["format", "file, about", "bits per site weight", "relative error", "sites it does not fit"],
        rows,
    )


def show_sensitivity(
    name: str, source: Source, choice: TaskChoice, formats: list[str] | None, measure: int, seed: int, json: bool
) -> None:
    """Predict, measure a sample, print both."""
    if source.kind == "artifact":
        raise InputError(f"{name} is a tersor artifact already; inspect the original model instead")
    if measure < 0:
        raise InputError(f"--measure {measure} is not a number of predictions; write for example 10, or 0 for none")
    task = open_task_for(source, choice)
    with progress_bars(json) as progress:
        found = predict(source.model, task, formats or SCHEMES, num_measured=measure, seed=seed, progress=progress)
    if json:
        print_json({"model": name, "task": task.description, **found.to_dict()})
        return
    print_sensitivity(name, found)
    out.print(f"from the calibration split of: {task.description}", markup=False, highlight=False)


def print_sensitivity(name: str, found: Sensitivity) -> None:
    """The table of predictions, and the sample beside what was measured."""
    schemes = list(dict.fromkeys(scheme for losses in found.sites.values() for scheme in losses))
    print_table(
        f"{name}: predicted loss of each scheme at each site, in {found.unit}; - where it does not fit",
        ["site", *schemes],
        [
            (site, *(f"{losses[scheme]:.2e}" if scheme in losses else "-" for scheme in schemes))
            for site, losses in found.sites.items()
        ],
    )
    if found.sample:
        rows = [(m.site, m.scheme, f"{m.predicted:.2e}", f"{m.measured:.2e}") for m in found.sample]
        print_table("a sample, measured", ["site", "scheme", "predicted", "measured"], rows)
        out.print(
            f"rank correlation (Spearman) of predicted and measured: {found.correlation:.2f}, n = {len(found.sample)}",
            markup=False,
            highlight=False,
        )


def training_steps(source: Source, fields: dict[str, Any], lora: list[str], base: str) -> dict[str, TrainingStep]:
    """The training steps whose memory is predicted, by name; adapters only for an artifact, which is packed."""
    packed = source.kind == "artifact"
    steps: dict[str, TrainingStep] = {}
    for name, flags in (("", {}), (", checkpointed", {"gradient_checkpointing": True})):
        if flags and source.kind == "custom":
            continue
        given = fields | flags
        if not packed:
            steps[f"full{name}"] = step_of(None, None, given)
        steps[f"{'packed, LoRA' if packed else 'LoRA'}{name}"] = step_of(lora, None, given)
        if not packed:
            steps[f"QLoRA, {base}{name}"] = step_of(lora, base, given)
    return steps


def show_training_memory(
    name: str, source: Source, choice: TaskChoice | None, steps: dict[str, TrainingStep], context: int, json: bool
) -> None:
    """A line for each way to train."""
    if context < 2:
        raise InputError(f"--context {context} leaves no token to predict; write for example 512")
    task: Task = Tokens(context) if choice is None else open_task_for(source, choice)
    found = {}
    for title, step in steps.items():
        dtype = torch.float32 if isinstance(step, FinetuneStep) else None
        found[title] = predict_training(source.model, task, step, dtype=dtype)
    if json:
        print_json({"model": name, "task": task.description, "training": {t: f.to_dict() for t, f in found.items()}})
        return
    rows = [
        (
            title,
            f"{f.num_trained:,}",
            *(megabytes(n) for n in (f.weights, f.gradients, f.optimizer, f.activations, f.peak, f.copies)),
        )
        for title, f in found.items()
    ]
    first = next(iter(found.values()))
    tokens = f" of {first.length} tokens" if first.length else ""
    print_table(
        f"{name}: memory of training with batches of {first.batch_size}{tokens}",
        ["training", "trained", "weights", "gradients", "optimizer", "activations", "peak", "host copy"],
        rows,
    )
    if first.block_formula is not None:
        out.print(
            f"activations of the blocks by the formula s b h (34 + 5 a s / h): {megabytes(first.block_formula)}",
            highlight=False,
        )
    out.print(f"predicted, not measured, for: {task.description}", markup=False, highlight=False)


SELECTION = [
    "bf16",
    *(f"int{bits}{group}" for bits in (8, 6, 5, 4, 3, 2) for group in ("", "-g32")),
    "int4-g128",
    "int4-g32-asym",
    "bitmask",
]
