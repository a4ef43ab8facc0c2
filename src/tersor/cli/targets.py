"""`tersor targets`: the table of clients that `tersor export --to` writes for."""

import re
from importlib.metadata import PackageNotFoundError, distribution, requires

from tersor.cli import options
from tersor.cli.console import out, print_json, print_table
from tersor.exporters import ROWS
from tersor.exporters.contract import Runnable
from tersor.runtimes import RUNTIMES, Decodes

OF_EXTRA = re.compile(r"""([\w.-]+).*;\s*extra\s*==\s*['"](.+?)['"]""")  # a requirement, as the package declares it


def targets(json: options.Json = False) -> None:
    """List the clients of `tersor export --to`: what reads the file, which formats it holds, which extra it needs."""
    rows = [
        {
            "to": export.name,
            "writes": f"*{export.suffix}" if export.suffix else "folder",
            "readers": export.readers,
            "holds": export.holds,
            "models": "any" if isinstance(export, Runnable) else "artifacts of Hugging Face models",
            "checked": export.runtime if isinstance(export, Runnable) else None,
            "bench": [each.name for each in RUNTIMES.values() if export.suffix and export.suffix in each.suffixes],
            "extra": export.extra,
            "installed": installed(export.extra),
        }
        for export in ROWS
    ]
    if json:
        print_json({"targets": rows})
        return
    print_table(
        "targets: tersor export ARTIFACT --to TARGET -o OUT",
        ["target", "writes", "read by", "holds", "needs"],
        [(r["to"], r["writes"], r["readers"], r["holds"], needed(r["extra"], r["installed"])) for r in rows],
    )
    run = ", ".join(str(r["to"]) for r in rows if r["checked"])
    out.print(f"{run}: any model; what is written is run here, compared and timed before it is kept")
    timed = ", ".join(f"*{export.suffix}" for export, row in zip(ROWS, rows, strict=True) if row["bench"])
    writers = ", ".join(name for name, each in RUNTIMES.items() if isinstance(each, Decodes))
    out.print(f"tersor bench: {timed} and folders; --new-tokens for language models, in {writers}", highlight=False)


def installed(extra: str | None) -> bool:
    """True if all packages of an extra of tersor are installed."""
    named = [match.groups() for text in requires("tersor") or [] if (match := OF_EXTRA.match(text))]
    try:
        for package in (package for package, of in named if of == extra):
            distribution(package)
    except PackageNotFoundError:
        return False
    return True


def needed(extra: object, is_installed: object) -> str:
    """The extra to install, marked if it is installed; `-` if none is needed."""
    if not extra:
        return "-"
    return f"{extra} (installed)" if is_installed else f"pip install 'tersor[{extra}]'"
