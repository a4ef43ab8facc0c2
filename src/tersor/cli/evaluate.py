"""`tersor evaluate MODEL`: the scorecard of one model."""

from dataclasses import asdict
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import err, out, print_json, print_table, progress_bars
from tersor.jobs.compress import evaluate_model
from tersor.kernels import choices
from tersor.report.card import scorecard_rows


def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, artifact, or package.module:factory.")],
    weights: options.Weights = None,
    task: options.TaskName = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    task_option: options.TaskOption = None,
    dtype: options.Dtype = None,
    batch: options.Batch = None,
    timing_seconds: options.TimingSeconds = None,
    threads: options.Threads = 1,
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Leave entropy-coded weights in their file and decode each as it runs.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Measure a model: bytes, memory, operations, latency, and its score with an interval."""
    with progress_bars(json) as progress:
        card, description = evaluate_model(
            model,
            weights=weights,
            task_choice=options.task_choice(task, data, calibration, task_option),
            batch_sizes=options.batch_sizes(batch),
            num_threads=options.checked_threads(threads),
            timing_seconds=options.checked_seconds(timing_seconds),
            dtype=options.dtype_named(dtype),
            lazy=lazy,
            progress=progress,
        )
    notes = list(card.untimed)
    if task in (None, "fidelity"):
        notes.append(
            f"fidelity compares a model with the original, and here with itself, so its score says nothing; "
            f"tersor compare ORIGINAL {model} judges it"
        )
    if json:
        kernels = [asdict(choice) for choice in choices()]
        print_json({"scorecard": card.to_dict(), "measured_on": description, "notes": notes, "kernels": kernels})
        return
    print_table(model, ["", "measured"], scorecard_rows([card]))
    for note in notes:
        err.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    out.print(f"measured on: {description}", markup=False, highlight=False)
