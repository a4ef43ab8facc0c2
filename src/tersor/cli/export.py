"""`tersor export ARTIFACT --to gguf -o OUT.gguf`: the same values in a client's own layout."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import events, out, print_json
from tersor.jobs.export import ExampleInputs, Exported
from tersor.jobs.export import export as export_model
from tersor.jobs.settings import Output
from tersor.report.card import megabytes


def export(
    model: Annotated[str, typer.Argument(help="Artifact folder; --to onnx also takes a model that is not compressed.")],
    to: Annotated[str, typer.Option(help="The runtime or library that will load it; `tersor targets` lists them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create; for clients of one file, a file.")],
    overwrite: options.Overwrite = False,
    weights: options.Weights = None,
    task: options.TaskName = None,
    data: Annotated[Path | None, typer.Option(help="Data whose first rows are the example inputs.")] = None,
    task_option: options.TaskOption = None,
    shape: Annotated[
        str | None, typer.Option(help="Size of one example of a model of one array, such as 3,32,32.")
    ] = None,
    fixed: Annotated[
        list[str] | None, typer.Option(help="Axis that keeps the examples' size: batch or sequence. Repeatable.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of computations that are not integer: float32, bfloat16 or float16 (onnx and web: float32, or "
            "float16). Without it: as it was saved."
        ),
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="onnx, web: a scale per token for int8-dynamic, as in the artifact.")
    ] = False,
    float_outputs: Annotated[
        bool, typer.Option("--float-outputs", help="onnx, openvino, web: never round the outputs of int8 convolutions.")
    ] = False,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="onnx, openvino, web: write formats it cannot hold as decoded fp16 weights; executorch: fp32.",
        ),
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="onnx, openvino: leave a language model without key/value cache.")
    ] = False,
    cpu: Annotated[
        str | None,
        typer.Option(
            help="onnx, openvino, web: any (the default): int8 products are exact on every processor; vnni: on those "
            "with VNNI instructions or ARM's alone, with weights as they are."
        ),
    ] = None,
    runtime_path: Annotated[
        Path | None,
        typer.Option(help="web: folder of the npm package onnxruntime-web; default: of ./node_modules."),
    ] = None,
    threads: options.Threads = 1,
    json: options.Json = False,
) -> None:
    """Write an artifact so that another runtime loads it, with exactly the values that were chosen.

    Runtimes that run here load the result at once; it is compared with the model and timed before it is kept.
    """
    given: dict[str, bool | str | Path | None] = {"runtime_path": runtime_path, "cpu": cpu, "per_token": per_token}
    given |= {"float_outputs": float_outputs, "decode": decode}
    with events(json) as listener:
        made = export_model(
            ModelSpec(model, weights, options.dtype_named(SHORT.get(dtype or "", dtype))),
            Output(output, overwrite),
            to,
            {name: value for name, value in given.items() if value} | ({"cache": False} if no_cache else {}),
            ExampleInputs(options.task_data(task, data, None, task_option), options.shape_of(shape), fixed or ()),
            threads,
            listener,
        )
    if json:
        print_json(
            {
                "output": str(made.output),
                "to": made.to,
                "bytes": made.num_bytes,
                "formats": made.formats,
                "notes": made.notes,
                "check": asdict(made.check) if made.check else None,
                "opened": made.opened,
            }
        )
        return
    size = megabytes(made.num_bytes)
    out.print(f"{made.output}: {len(made.formats)} sites for {made.to}, {size}", markup=False, highlight=False)
    for line in checked(made):
        out.print(line, markup=False, highlight=False)


SHORT = {"fp32": "float32", "fp16": "float16"}


def checked(made: Exported) -> list[str]:
    """Lines on how the exported file ran: difference of outputs, and speed."""
    if made.check is None:
        return [made.opened] if made.opened else []
    found, latency = made.check, made.check.latency
    low, high = latency.speedup_interval
    return [
        f"{found.runtime}: outputs differ from the model's by {found.difference:.2%} "
        f"(rounding of inputs in the model itself: {found.input_rounding:.2%})",
        f"{found.row}: {latency.p50:.2f} ms, {found.against} {found.float_latency.p50:.2f} ms: "
        f"{latency.speedup:.2f}x [{low:.2f}, {high:.2f}], {latency.difference()}",
    ]
