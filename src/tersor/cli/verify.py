"""`tersor verify ARTIFACT`: read all of it, and say whether it is what was written."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import events, out, print_json
from tersor.jobs.pack import verify as verify_folder
from tersor.report.card import megabytes


def verify(
    artifact: Annotated[Path, typer.Argument(help="Artifact, packed folder, or model.tersor.")],
    json: options.Json = False,
) -> None:
    """Check the hash of every file, and of a model.tersor every checksum and every value."""
    with events(json) as told:
        found = verify_folder(artifact, told)
    if json:
        checked = found.checked
        about = {"file": str(found.file), "bytes": found.num_bytes, "tensors": found.num_tensors, "whole": True}
        all_files = {"all_files": checked is not None and checked.is_whole}
        print_json(about | all_files | {"unlisted": list(checked.unlisted if checked else ())})
        return
    text = f"{found.file}: whole; {found.num_tensors} tensors, {megabytes(found.num_bytes)}"
    out.print(text, markup=False, highlight=False)
