"""`tersor compare A B`: two models measured side by side, and the verdict of B against A."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import err, leave, out, print_json, print_table, progress_bars
from tersor.jobs.compress import compare_models
from tersor.kernels import choices
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
    with progress_bars(json) as progress:
        cards, description, verdicts = compare_models(
            [a, b],
            weights or [],
            task_choice=options.task_choice(task, data, calibration, task_option),
            drop=drop,
            seed=seed,
            batch_sizes=options.batch_sizes(batch),
            num_threads=options.checked_threads(threads),
            timing_seconds=options.checked_seconds(timing_seconds),
            dtype=options.dtype_named(dtype),
            progress=progress,
        )
    if json:
        found = {"scorecards": [card.to_dict() for card in cards], "verdict": verdicts[0].to_dict()}
        print_json(found | {"measured_on": description, "kernels": [asdict(choice) for choice in choices()]})
        leave(verdicts[0], exit_code)
        return
    for sentence in cards[0].untimed:
        err.print(f"note: {sentence}", style="yellow", markup=False, highlight=False)
    print_table("side by side", ["", a, b], comparison(*cards))
    out.print(f"measured on: {description}", markup=False, highlight=False)
    out.print(f"verdict: {verdicts[0].sentence()}", style="bold", markup=False, highlight=False)
    leave(verdicts[0], exit_code)
