"""`tersor bench A B ...`: models in their runtimes, timed in turn on the same inputs, and the memory each takes."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import out, print_json, print_table, progress_bars
from tersor.errors import InputError
from tersor.measure.bench import Bench, candidates_of
from tersor.measure.bench import bench as run_bench
from tersor.measure.scorecard import machine
from tersor.report.card import megabytes

Length = Annotated[int | None, typer.Option(help="Tokens of a made-up example; 128 if not given.")]
Shape = Annotated[
    str | None, typer.Option(help="Shape of a made-up example where the model leaves it open: 3,224,224.")
]


def bench(
    models: Annotated[
        list[str],
        typer.Argument(help="Folder, hub id, artifact, .onnx, .xml, .pte or package.module:factory; the first leads."),
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="torch, onnx, openvino, openvino-bf16, executorch: for all or once for each; else the file decides."
        ),
    ] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="State dicts or artifact folders of the factories, in this order.")
    ] = None,
    batch: options.Batch = "1,32",
    threads: Annotated[str, typer.Option(help="Numbers of CPU threads, separated by commas.")] = "1",
    length: Length = None,
    shape: Shape = None,
    task: options.TaskName = None,
    data: options.Data = None,
    task_option: options.TaskOption = None,
    seconds: Annotated[float, typer.Option(help="About how long to time each model at each batch size.")] = 4.0,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Time the processor, not the clock: one thread, on a busy machine.")
    ] = False,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Leave out memory, for which each model is opened once more.")
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Time models in their runtimes side by side; says so where no difference was measured."""
    from_task = bool(task or data or task_option)
    with progress_bars(json) as progress:
        found = run_bench(
            candidates_of(models, runtime or [], weights or []),
            batch_sizes=options.batch_sizes(batch),
            thread_counts=thread_counts(threads),
            length=length,
            shape=example_shape(shape),
            task_choice=options.task_choice(task, data, None, task_option) if from_task else None,
            seconds=seconds,
            memory=not no_memory,
            cpu_time=cpu_time,
            seed=seed,
            progress=progress,
        )
    if json:
        print_json(found.to_dict() | {"measured_on": machine()})
        return
    show(found, models[0])


def show(found: Bench, first: str) -> None:
    """Two tables: times, and memory."""
    candidates = [timing.candidate for timing in found.timings[: len(found.memory)]]
    rows = [
        (
            timing.candidate.model,
            timing.candidate.runtime,
            timing.latency.num_threads,
            timing.latency.batch_size,
            f"{timing.latency.p50:.3f}",
            f"{timing.latency.p95:.3f}",
            f"{timing.latency.spread:.0%}",
            "-" if i % len(candidates) == 0 else f"{timing.latency.speedup:.2f}x",
            "-" if i % len(candidates) == 0 else "{:.2f} to {:.2f}".format(*timing.latency.speedup_interval),
            "-" if i % len(candidates) == 0 else timing.difference,
        )
        for i, timing in enumerate(found.timings)
    ]
    columns = [
        "model",
        "runtime",
        "threads",
        "batch",
        "median ms",
        "p95 ms",
        "spread",
        "speed-up",
        "95 %",
        "difference",
    ]
    print_table(f"latency in turn; speed-up over {first}", columns, rows)
    if any(found.memory):
        print_table(
            "memory, each in a process of its own, without the libraries",
            ["model", "runtime", "loaded", "peak"],
            [
                (c.model, c.runtime, megabytes(m.loaded if m else None), megabytes(m.peak if m else None))
                for c, m in zip(candidates, found.memory, strict=True)
            ],
        )
    out.print(f"run on {found.inputs}", markup=False, highlight=False)
    low, high = min(n[0] for n in found.noise), max(n[1] for n in found.noise)
    noise = f"{first} against itself: {low:.2f} to {high:.2f}; a ratio within that is no difference"
    out.print(f"{noise}. {', '.join(found.versions)}", markup=False, highlight=False)


def thread_counts(text: str) -> tuple[int, ...]:
    """`1,2` as numbers."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"--threads '{text}' is not a list of thread counts; write for example 1,2")
    return counts


def example_shape(text: str | None) -> tuple[int, ...] | None:
    """`3,224,224` as numbers."""
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--shape '{text}' is not a shape; write for example 3,224,224")
    return sizes
