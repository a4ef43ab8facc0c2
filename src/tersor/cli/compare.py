"""`tersor compare A B`: two models measured side by side, and the verdict of B against A."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import events, leave, out, print_json, print_table
from tersor.jobs.compare import compare as compare_models
from tersor.report.card import comparison


def compare(
    a: Annotated[str, typer.Argument(help="The reference: folder, hub id, artifact, or package.module:factory.")],
    b: Annotated[str, typer.Argument(help="The model that is judged.")],
    weights: Annotated[
        list[Path] | None, typer.Option(help="State dicts or artifact folders of A and B, in this order.")
    ] = None,
    task: options.TaskName = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    task_option: options.TaskOption = None,
    drop: options.Drop = "1%",
    dtype: options.Dtype = None,
    batch: options.Batch = None,
    timing_seconds: options.TimingSeconds = None,
    seed: options.Seed = 0,
    threads: options.Threads = 1,
    exit_code: options.ExitCode = False,
    json: options.Json = False,
) -> None:
    """Measure two models on the same examples, in turn, and judge the difference."""
    with events(json) as listener:
        found = compare_models(
            options.models_of([a, b], weights, dtype),
            options.task_data(task, data, calibration, task_option),
            drop,
            seed,
            options.timing(batch, threads, timing_seconds),
            listener,
        )
    verdict = found.verdicts[0]
    if json:
        cards = {"scorecards": [card.to_dict() for card in found.scorecards], "verdict": verdict.to_dict()}
        print_json(cards | {"measured_on": found.task, "kernels": [asdict(choice) for choice in found.kernels]})
        leave(verdict.outcome, exit_code)
        return
    print_table("side by side", ["", a, b], comparison(*found.scorecards))
    out.print(f"measured on: {found.task}", markup=False, highlight=False)
    out.print(f"verdict: {verdict.sentence()}", style="bold", markup=False, highlight=False)
    leave(verdict.outcome, exit_code)
