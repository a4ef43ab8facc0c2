"""`tersor formats`: the table of formats."""

from tersor.activations.observers import OBSERVERS
from tersor.activations.quantizers import ACTIVATIONS
from tersor.cli import options
from tersor.cli.console import print_json, print_table
from tersor.codecs.file_bytes import file_bytes_of_shape
from tersor.formats import FORMATS
from tersor.formats.contract import Format
from tersor.schemes.aliases import ALIASES
from tersor.schemes.scheme import usual_method

EXAMPLE = (1024, 1024)
DATA = "depends on the data"


def formats(json: options.Json = False) -> None:
    """List the formats, their bits per weight, and the method each gets when none is named, without and with data."""
    rows = [
        {
            "format": name,
            "bits_per_weight": bits_per_weight(format),
            "usual_method": usual_method(format),
            "usual_method_with_data": usual_method(format, sees_inputs=True),
        }
        for name, format in FORMATS.items()
    ]
    if json:
        print_json(
            {
                "formats": rows,
                "activations": list(ACTIVATIONS),
                "observers": list(OBSERVERS),
                "shorthands": ALIASES,
            }
        )
        return
    print_table(
        "formats (bits per weight at 1024 x 1024, scales and zero points counted)",
        ["format", "bits per weight", "usual method without data", "with calibration data"],
        [
            (
                r["format"],
                f"{r['bits_per_weight']:.3f}" if r["bits_per_weight"] else DATA,
                r["usual_method"],
                r["usual_method_with_data"],
            )
            for r in rows
        ],
    )
    print_table(
        "activations: write FORMAT/ACTIVATION",
        ["activation"],
        [(name,) for name in ACTIVATIONS],
    )
    print_table("names that other tools use", ["name", "scheme"], list(ALIASES.items()))
    print_table(
        "observers of static integers: write FORMAT/OBSERVER:ACTIVATION",
        ["observer", "range"],
        [(name, " ".join((observer.__doc__ or "").split("\n\n")[0].split())) for name, observer in OBSERVERS.items()],
    )


def bits_per_weight(format: Format) -> float | None:
    """Bits per weight of a format, scales included; None if they depend on the weights."""
    num_bytes = file_bytes_of_shape(format, EXAMPLE)
    return None if num_bytes is None else 8 * num_bytes / (EXAMPLE[0] * EXAMPLE[1])
