"""`tersor methods`: the table of methods."""

import inspect as python_inspect
from dataclasses import fields
from typing import Any

from tersor.cli import options
from tersor.cli.console import print_json, print_table
from tersor.formats import FORMATS
from tersor.methods import METHODS


def methods(json: options.Json = False) -> None:
    """List the methods, their options, and the formats they fill."""
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        instance = method()
        accepted = [format_name for format_name, format in FORMATS.items() if instance.accepts(format) is None]
        module = python_inspect.getmodule(method)
        rows.append(
            {
                "method": name,
                "about": (module.__doc__ or "").strip().splitlines()[0] if module else "",
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


def summary(formats: list[str]) -> str:
    """`int4, int4-asym, ... (24)` in place of a long list."""
    return ", ".join(formats) if len(formats) <= 3 else f"{formats[0]}, {formats[1]}, ... ({len(formats)})"
