"""`tersor verify ARTIFACT`: read all of it, and say whether it is what was written."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.analysis.coding import verify as verify_folder
from tersor.cli import options
from tersor.cli.console import out, print_json
from tersor.report.card import megabytes


def verify(
    artifact: Annotated[Path, typer.Argument(help="Artifact, packed folder, or model.tersor.")],
    json: options.Json = False,
) -> None:
    """Check the hash of the weights file, and of a model.tersor every checksum and every value."""
    found = verify_folder(artifact)
    if json:
        print_json({"file": str(found.file), "bytes": found.num_bytes, "tensors": found.num_tensors, "whole": True})
        return
    text = f"{found.file}: whole; {found.num_tensors} tensors, {megabytes(found.num_bytes)}"
    out.print(text, markup=False, highlight=False)
