"""`tersor verify ARTIFACT`: read every byte, and say if the files are as they were written."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options
from tersor.cli.console import events, out, print_json
from tersor.jobs.pack import verify as verify_folder
from tersor.jobs.pack import verify_file
from tersor.report.card import megabytes

RUNTIME_FILES = (".onnx", ".xml", ".pte")


def verify(
    artifact: Annotated[Path, typer.Argument(help="Artifact, packed folder, model.tersor, or a file for a runtime.")],
    json: options.Json = False,
) -> None:
    """Check the hash of every file, and every checksum and value of a model.tersor; for a file exported to a runtime,
    also try if this processor computes its int8 products exactly."""
    if artifact.suffix in RUNTIME_FILES:
        with events(json) as listener:
            made = verify_file(artifact, listener)
        if json:
            print_json(asdict(made) | {"file": str(made.file)})
        else:
            whole = "whole; " if made.marked is None else ""
            out.print(
                f"{made.file}: {whole}{megabytes(made.num_bytes)}; {made.products}", markup=False, highlight=False
            )
        return
    with events(json) as listener:
        found = verify_folder(artifact, listener)
    if json:
        checked = found.checked
        about = {"file": str(found.file), "bytes": found.num_bytes, "tensors": found.num_tensors, "whole": True}
        all_files = {"all_files": checked is not None and checked.is_whole}
        print_json(about | all_files | {"unlisted": list(checked.unlisted if checked else ())})
        return
    text = f"{found.file}: whole; {found.num_tensors} tensors, {megabytes(found.num_bytes)}"
    out.print(text, markup=False, highlight=False)
