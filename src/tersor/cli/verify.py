"""`tersor verify ARTIFACT`: read all of it, and say whether it is what was written."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.analysis.coding import verify as verify_folder
from tersor.cli import options
from tersor.cli.console import err, out, print_json
from tersor.report.card import megabytes


def verify(
    artifact: Annotated[Path, typer.Argument(help="Artifact, packed folder, or model.tersor.")],
    json: options.Json = False,
) -> None:
    """Check the hash of every file, and of a model.tersor every checksum and every value."""
    found = verify_folder(artifact)
    checked = found.checked
    unlisted = checked.unlisted if checked else ()
    if json:
        about = {"file": str(found.file), "bytes": found.num_bytes, "tensors": found.num_tensors, "whole": True}
        print_json(about | {"all_files": checked is not None and checked.is_whole, "unlisted": list(unlisted)})
        return
    if checked is not None and not checked.is_whole:
        err.print("note: only the weights could be checked: this folder has no list of all its files", style="yellow")
    for name in unlisted:
        err.print(f"note: {name}: not listed, so nothing is known of it", style="yellow")
    text = f"{found.file}: whole; {found.num_tensors} tensors, {megabytes(found.num_bytes)}"
    out.print(text, markup=False, highlight=False)
