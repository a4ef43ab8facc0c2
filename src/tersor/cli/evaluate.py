"""`tersor evaluate MODEL`: the scorecard of one model."""

from dataclasses import asdict
from typing import Annotated

import typer

from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import events, out, print_json, print_table
from tersor.jobs.evaluate import evaluate as evaluate_model
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
    with events(json) as listener:
        found = evaluate_model(
            ModelSpec(model, weights, options.dtype_named(dtype), lazy),
            options.task_data(task, data, calibration, task_option),
            options.timing(batch, threads, timing_seconds),
            listener,
        )
    if json:
        about = {"scorecard": found.scorecard.to_dict(), "measured_on": found.task, "notes": found.notes}
        print_json(about | {"kernels": [asdict(choice) for choice in found.kernels]})
        return
    print_table(model, ["", "measured"], scorecard_rows([found.scorecard]))
    out.print(f"measured on: {found.task}", markup=False, highlight=False)
