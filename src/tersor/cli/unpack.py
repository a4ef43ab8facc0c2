"""`tersor unpack PACKED -o OUT`: back to plain safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.pack import show
from tersor.jobs.pack import unpack as unpack_folder
from tersor.jobs.settings import Output


def unpack(
    packed: Annotated[Path, typer.Argument(help="Folder with a model.tersor, artifact, or the file itself.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to create; FILE.safetensors for a .tersor file alone.")
    ],
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write plain safetensors that transformers loads; an artifact's packed weights are decoded."""
    show(unpack_folder(packed, Output(output, overwrite)), json)
