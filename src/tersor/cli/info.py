"""`tersor info PACKED`: bytes of every layer in a model.tersor, beside the least that theory allows."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.analysis.coding import info as info_of
from tersor.cli import options
from tersor.cli.console import out, print_json, print_table
from tersor.report.card import megabytes


def info(
    packed: Annotated[Path, typer.Argument(help="Folder with a model.tersor, or the file itself.")],
    against: Annotated[
        str | None,
        typer.Option(help="The original model: the bound is then computed at the measured error."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Bits per weight of every site: stored, entropy, and the rate-distortion bound of normal weights."""
    found = info_of(packed, against)
    if json:
        print_json(found.to_dict())
        return

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    print_table(
        f"{found.file}: {megabytes(found.num_bytes)}, of which {megabytes(found.header_bytes)} are header and index",
        ["site", "format", "weights", "bits/weight", "entropy", "in classes", "overhead", "bound", "gap"],
        [
            (
                site.name,
                f"{site.format}, {site.num_states} states" if site.num_states else site.format,
                f"{site.num_weights:,}",
                number(site.bits),
                number(site.entropy),
                number(site.class_entropy),
                number(site.overhead),
                number(site.bound),
                number(site.gap),
            )
            for site in found.sites
        ],
    )
    kept = f"{megabytes(found.other_bytes)} are other tensors; sites take {found.bits:.3f} bits per weight"
    out.print(kept, markup=False, highlight=False)
    out.print(found.explanation, markup=False, highlight=False)
