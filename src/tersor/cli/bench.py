"""`tersor bench A B ...`: models in their runtimes, timed in turn on the same inputs, and the memory each takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import events, out, print_json, print_table
from tersor.core.errors import InputError
from tersor.jobs.bench import Bench, Candidate, MadeUp, candidates_of, inputs_of
from tersor.jobs.bench import bench as run_bench
from tersor.jobs.decode import DecodeBench, decode
from tersor.jobs.settings import Timing
from tersor.measure.memory import Memory
from tersor.measure.scorecard import machine
from tersor.report.card import megabytes

Length = Annotated[int | None, typer.Option(help="Tokens of a made-up example; 128 if not given.")]
NewTokens = Annotated[int | None, typer.Option(help="Time text generation at batch 1: number of tokens to generate.")]
Prompt = Annotated[int | None, typer.Option(help="Tokens of the prompt before generation (default 64).")]
Shape = Annotated[
    str | None, typer.Option(help="Shape of a made-up example where the model leaves it open: 3,224,224.")
]


def bench(
    models: Annotated[
        list[str],
        typer.Argument(help="Folder, hub id, .onnx, .xml, .pte, .gguf, package.module:factory; first: the reference."),
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="torch, onnx, openvino, openvino-bf16, executorch, llama.cpp: one, or one per model. Default: by file."
        ),
    ] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="State dicts or artifact folders of the factories, in this order.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, separated by commas; 1,32 if not given.")] = None,
    threads: Annotated[str, typer.Option(help="Numbers of CPU threads, separated by commas.")] = "1",
    new_tokens: NewTokens = None,
    prompt: Prompt = None,
    length: Length = None,
    shape: Shape = None,
    task: options.TaskName = None,
    data: options.Data = None,
    task_option: options.TaskOption = None,
    dtype: options.Dtype = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="About how long to time each model at each batch size; else 4, and a minute in all at most."),
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU seconds, not elapsed ones: for one thread on a busy machine.")
    ] = False,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Skip measuring memory, which opens each model once more.")
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Time models in their runtimes side by side; a ratio within the noise is called no difference."""
    candidates = candidates_of(options.models_of(models, weights, dtype), runtime or [])
    counts = options.whole_numbers(threads, "--threads", "1,2")
    sizes = None if batch is None else options.whole_numbers(batch, "--batch", "1,32")
    timing = Timing(sizes, counts, seconds=seconds, cpu_time=cpu_time, memory=not no_memory)
    chosen = options.task_data(task, data, None, task_option)
    if new_tokens is not None or prompt is not None:
        asked = {"--batch": batch if batch != "1" else None, "--length": length, "--shape": shape}
        for flag, value in {**asked, "--task, --data": chosen.is_given or None}.items():
            if value is not None:
                raise InputError(f"--new-tokens and --prompt are for made-up tokens at batch 1; leave {flag} out")
        with events(json) as listener:
            decoded = decode(
                candidates,
                64 if prompt is None else prompt,
                64 if new_tokens is None else new_tokens,
                timing,
                seed,
                listener,
            )
        if json:
            print_json(decoded.to_dict() | {"measured_on": machine()})
        else:
            show_decoding(decoded, models[0])
        return
    inputs = inputs_of(MadeUp(length, options.shape_of(shape)), chosen)
    with events(json) as listener:
        found = run_bench(candidates, inputs, timing, seed, listener)
    if json:
        print_json(found.to_dict() | {"measured_on": machine()})
        return
    show(found, models[0])


def show(found: Bench, first: str) -> None:
    """Print two tables: times, and memory."""
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
    show_memory(candidates, found.memory)
    out.print(f"run on {found.inputs}", markup=False, highlight=False)
    show_noise(first, found.noise, found.versions)


def show_decoding(found: DecodeBench, first: str) -> None:
    """Print the table of a text generation benchmark."""
    candidates = [timing.candidate for timing in found.timings[: len(found.memory)]]
    rows = [
        (
            timing.candidate.model,
            timing.candidate.runtime,
            timing.token.num_threads,
            f"{timing.prompt.p50:.1f}",
            f"{timing.token.p50:.2f}",
            f"{timing.token.p95:.2f}",
            f"{timing.token.spread:.0%}",
            f"{timing.tokens_per_second:.1f}",
            "-" if i % len(candidates) == 0 else f"{timing.token.speedup:.2f}x",
            "-" if i % len(candidates) == 0 else "{:.2f} to {:.2f}".format(*timing.token.speedup_interval),
            "-" if i % len(candidates) == 0 else timing.difference,
        )
        for i, timing in enumerate(found.timings)
    ]
    columns = ["model", "runtime", "threads", "prompt ms", "ms per token", "p95 ms", "spread", "tokens/s"]
    title = f"writing {found.num_new} tokens after {found.num_prompt}, in turn; speed-up over {first}"
    print_table(title, [*columns, "speed-up", "95 %", "difference"], rows)
    show_memory(candidates, found.memory)
    show_noise(first, found.noise, found.versions)


def show_memory(candidates: Sequence[Candidate], memory: Sequence[Memory | None]) -> None:
    """Print the memory of each candidate, if any was measured."""
    if any(memory):
        print_table(
            "memory, each in a process of its own, without the libraries",
            ["model", "runtime", "loaded", "peak"],
            [
                (c.model, c.runtime, megabytes(m.loaded if m else None), megabytes(m.peak if m else None))
                for c, m in zip(candidates, memory, strict=True)
            ],
        )


def show_noise(first: str, noise: Sequence[tuple[float, float]], versions: Sequence[str]) -> None:
    """Print the first model's ratio to itself, which is noise, and the versions that ran."""
    low, high = min(n[0] for n in noise), max(n[1] for n in noise)
    noise_line = f"{first} against itself: {low:.2f} to {high:.2f}; a ratio within that is no difference"
    out.print(f"{noise_line}. {', '.join(versions)}", markup=False, highlight=False)
