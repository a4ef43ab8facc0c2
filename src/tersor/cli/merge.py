"""`tersor merge BASE ADAPTER -o OUT`: add a LoRA adapter to the weights it was trained beside."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import events, out, print_json, print_table
from tersor.jobs.merge import Merged
from tersor.jobs.merge import merge as merge_models
from tersor.jobs.settings import Output


def merge(
    base: Annotated[
        str, typer.Argument(help="What the adapter was trained on: Hugging Face folder, hub id or artifact.")
    ],
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, as peft or tersor finetune --lora writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create, of the kind that BASE is.")],
    task: options.TaskName = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    train: options.Train = None,
    task_option: options.TaskOption = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Merge an adapter: into float weights by adding, into packed ones by rounding the sum anew."""
    spec = ModelSpec(base, dtype=options.dtype_named(dtype))
    chosen = options.task_data(task, data, calibration, task_option, train)
    with events(json) as listener:
        made = merge_models(spec, adapter, Output(output, overwrite), chosen, seed, listener)
    if json:
        print_json(made.to_dict())
    else:
        show(made)


NAMES = {
    "base": "base without the adapter",
    "naive": "merged by rounding to the nearest (not written)",
    "merged": "merged",
}


def show(made: Merged) -> None:
    """Print how far the merged model is from the base with the adapter beside it."""
    what = "KL divergence" if made.unit.startswith("nats") else "distance"
    print_table(
        f"{what} from the base with the adapter beside its weights, {made.unit}",
        ["model", what],
        [(NAMES[name], f"{value:.3g}") for name, value in made.kl.items()],
    )
    out.print(f"measured on: {made.task}", markup=False, highlight=False)
    how = (
        f"{made.num_packed} packed weights rounded anew in their formats" if made.num_packed else "added to the weights"
    )
    out.print(f"merged: {made.output}  ({how})", markup=False, highlight=False)
