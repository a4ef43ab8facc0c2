"""`tersor methods`: the table of methods."""

import re
import sys
from dataclasses import fields
from typing import Any

from tersor.cli import options
from tersor.cli.console import print_json, print_table
from tersor.formats import FORMATS
from tersor.methods import METHODS


def methods(json: options.Json = False) -> None:
    """List the methods that choose quantized values, their options, and the formats they write."""
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        instance = method()
        accepted = [format_name for format_name, format in FORMATS.items() if instance.accepts(format) is None]
        rows.append(
            {
                "method": name,
                "about": about(method),
                "options": {f.name: f.default for f in fields(method)},  # type: ignore[arg-type]
                "needs": sorted(instance.needs),
                "formats": accepted,
            }
        )
    if json:
        print_json({"methods": rows})
        return
    print_table(
        "methods: write METHOD:FORMAT or METHOD(option=value):FORMAT",
        ["method", "about", "options", "uses", "formats"],
        [
            (
                r["method"],
                r["about"],
                ", ".join(f"{k}={v}" for k, v in r["options"].items()),
                ", ".join(r["needs"]) or "no data",
                summary(r["formats"]),
            )
            for r in rows
        ],
    )


def about(method: type) -> str:
    """The first sentence of the file a method is in."""
    text = " ".join((sys.modules[method.__module__].__doc__ or "").split())
    sentence = re.match(r".*?\.(?= [A-Z]|$)", text)  # the dot of "et al. 2022" ends none
    return sentence[0] if sentence else text


def summary(formats: list[str]) -> str:
    """A long list of formats in short: `int4, int4-asym, ... (24)`."""
    return ", ".join(formats) if len(formats) <= 3 else f"{formats[0]}, {formats[1]}, ... ({len(formats)})"
