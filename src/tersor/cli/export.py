"""`tersor export ARTIFACT --to gguf -o OUT.gguf`: the same values in a client's own layout."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import err, out, print_json
from tersor.export.artifact import export_model
from tersor.report.card import megabytes


def export(
    artifact: Annotated[Path, typer.Argument(help="Folder that `tersor compress` made of a Hugging Face model.")],
    to: Annotated[str, typer.Option(help="Who reads it: gguf, compressed-tensors, gptq, awq, bitsandbytes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create; for gguf, a .gguf file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is an earlier export.")] = False,
    json: options.Json = False,
) -> None:
    """Write an artifact so that another runtime loads it, with exactly the values that were chosen."""
    made = export_model(artifact, output, to=to, overwrite=overwrite)
    if json:
        print_json(
            {
                "output": str(made.output),
                "to": made.to,
                "bytes": made.num_bytes,
                "formats": made.formats,
                "notes": made.notes,
            }
        )
        return
    for note in made.notes:
        err.print("note:", note, style="yellow", markup=False, highlight=False)
    size = megabytes(made.num_bytes)
    out.print(f"{made.output}: {len(made.formats)} sites for {made.to}, {size}", markup=False, highlight=False)
