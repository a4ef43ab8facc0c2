"""`tersor inspect MODEL`: the sites, their shapes and sizes, what each format would make of them, and at what loss."""

from typing import Annotated

import typer

from tersor.analysis.sensitivity import Sensitivity
from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import events, out, print_json, print_table
from tersor.cli.finetune import lora_fields
from tersor.core.errors import InputError
from tersor.jobs.inspect import Inspected, Predicted, TrainingNeeds
from tersor.jobs.inspect import inspect as inspect_model
from tersor.jobs.inspect import sensitivity as predict_losses
from tersor.jobs.inspect import training_memory as predict_memory
from tersor.report.card import megabytes


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
    """List the weights that can be compressed (sites), all other tensors, and the cost of every format."""
    if not (sensitivity or training_memory) and (task or data or calibration or task_option):
        raise InputError("inspect runs data only for --sensitivity; add it, or leave --task and --data out")
    spec = ModelSpec(model, weights, options.dtype_named(dtype))
    chosen = options.task_data(task, data, calibration, task_option, train)
    with events(json) as listener:
        if training_memory:
            settings = {"batch_size": batch_size, "optimizer": optimizer}
            needs = predict_memory(spec, chosen, settings, lora_fields(lora or ["r=16"]), base, context)
        elif sensitivity:
            predicted = predict_losses(spec, chosen, format or (), measure, seed, listener)
        else:
            found = inspect_model(spec, format or (), listener)
    if training_memory:
        show_training_memory(model, needs, json)
    elif sensitivity:
        show_sensitivity(model, predicted, json)
    else:
        show(found, json)


def show(found: Inspected, json: bool) -> None:
    """Print two tables: the sites, and the cost of each format."""
    if json:
        print_json(found.to_dict())
        return
    num_weights, num_bytes = sum(site.weights for site in found.sites), megabytes(found.file_bytes)
    what = f"{found.architecture}, {num_bytes}, {len(found.sites)} sites with {num_weights:,} weights"
    print_table(
        f"{found.model}: {what}",
        ["site", "kind", "shape", "dtype", "format", "weights", "share", "tied to"],
        [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                row.dtype,
                row.format or "-",
                f"{row.weights:,}",
                f"{row.weights / num_weights:.1%}",
                ", ".join(row.tied),
            )
            for row in found.sites
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
        for c in found.formats
    ]
    print_table(
        f"cost of a format at every site it fits ({megabytes(found.kept_bytes)} are kept as they are and counted)",
        ["format", "file, about", "bits per site weight", "relative error", "sites it does not fit"],
        rows,
    )


def show_sensitivity(name: str, predicted: Predicted, json: bool) -> None:
    """Print the predicted losses, and those of the sample that was measured."""
    if json:
        print_json({"model": name, "task": predicted.task, **predicted.losses.to_dict()})
        return
    print_sensitivity(name, predicted.losses)
    out.print(f"from the calibration split of: {predicted.task}", markup=False, highlight=False)


def print_sensitivity(name: str, found: Sensitivity) -> None:
    """Print a table of predicted losses, and predicted beside measured ones for the sample."""
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


def show_training_memory(name: str, needs: TrainingNeeds, json: bool) -> None:
    """Print the memory of each way to train, a line each."""
    found = needs.memory
    if json:
        print_json({"model": name, "task": needs.task, "training": {t: f.to_dict() for t, f in found.items()}})
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
    out.print(f"predicted, not measured, for: {needs.task}", markup=False, highlight=False)
