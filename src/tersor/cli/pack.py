"""`tersor pack MODEL -o OUT`: any safetensors checkpoint or artifact, entropy-coded without loss."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.checkpoint.pack import PackedFolder
from tersor.cli import options
from tersor.cli.console import out, print_json
from tersor.jobs.pack import pack as pack_folder
from tersor.jobs.settings import Output
from tersor.report.card import megabytes


def pack(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, .safetensors file, or artifact.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to create; FILE.tersor for a .safetensors file alone.")
    ],
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Make a checkpoint smaller without changing a bit: its tensors as model.tersor, everything else as it came."""
    show(pack_folder(model, Output(output, overwrite)), json)


def show(written: PackedFolder, json: bool) -> None:
    """Print the sizes before and after."""
    if json:
        print_json({"output": str(written.output), "bytes_before": written.before, "bytes": written.after})
        return
    share = f"{megabytes(written.after)}, {written.after / max(1, written.before):.1%} of {megabytes(written.before)}"
    out.print(f"{written.output}: {share}", markup=False, highlight=False)
