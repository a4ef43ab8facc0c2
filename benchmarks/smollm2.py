"""SmolLM2-135M-Instruct at many formats and methods: quality, size and cost of each.

    python benchmarks/smollm2.py --assets FOLDER [--rows SCHEME ...] [--results FILE] [--write]

A row is a scheme over the linear weights of the decoder, embeddings and head kept (after `TRANSFORM | `, if any), or
`plan(bits=B)`: the allocator's choice under a budget of B bits per parameter of the whole file, embeddings and head
inside. Each runs in a process of its own and is appended to FILE (JSON lines), so that a run that was stopped goes on
where it was; `--write` puts everything in FILE into benchmarks/smollm2.md. The protocol is that of protocol.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protocol import (
    KEPT,
    Assets,
    Meter,
    add_asset_options,
    evaluate,
    open_original,
    open_protocol,
)
from rows import Results, run_rows

GPTQS = ["gptq(upstream_correction=0,num_rounds=0)", "gptq(num_rounds=0)", "gptq(num_rounds=2)"]
LADDER = ["nearest", "mse", *GPTQS, "autoround(rate=1)"]
SECTIONS = {
    "4 bits: what each step gains": [f"{method}:int4-g64" for method in LADDER],
    "3 bits": [f"{method}:int3-g64" for method in LADDER],
    "2 bits": [f"{method}:int2-g64" for method in LADDER],
    "8 bits, weights alone and with inputs": [
        *("int8", "int8-dynamic", "int8/int8-static", "smooth | int8/int8-static"),
        *("fp8-e4m3", "fp8-e5m2", "fp8-e4m3/fp8-e4m3-dynamic"),
    ],
    "4-bit floats and codebooks": [
        f"{method}:{format}" for format in ("nf4", "nvfp4", "mxfp4", "codebook16") for method in ("nearest", "gptq")
    ],
    "Half of the weights, and two of every four": [
        f"{method}:{format}" for format in ("bitmask", "2:4") for method in ("magnitude", "wanda", "sparsegpt")
    ]
    + ["sparsegpt:2:4+int4-g64"],
    "A budget for the whole file": [f"plan(bits={bits})" for bits in (5, 4, 3)],
}
CANDIDATES = [f"gptq:int{bits}{group}" for bits in (8, 6, 5, 4, 3, 2) for group in ("", "-g128", "-g64", "-g32")]
ROWS = ["keep", *(row for rows in SECTIONS.values() for row in rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="SCHEME", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-smollm2.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="SCHEME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        print(json.dumps(measure(args.run, assets)))
        return 0
    results = Results(args.results)
    complete = run_rows(args.rows, results, assets.options, show=line, num_threads=args.threads)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


def measure(row: str, assets: Assets) -> dict[str, Any]:
    """Compress, save, load and score one row, in this process; the costs are of compressing alone."""
    import tersor
    from tersor.checkpoint.open import open_model

    source, task = open_model(str(assets.model)), open_protocol(assets)
    with Meter() as meter:
        made = tersor.compress(source.model, recipe_of(row, source.model, task), task)
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(made.model, folder, source=assets.model)
        file_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        loaded = tersor.load(folder).float()
    sizes = {site.name: (site.shape[0] * site.shape[1], site.num_bytes) for site in made.sites}
    return {
        "row": row,
        **asdict(evaluate(loaded, open_original(assets), task)),
        "bits": 8 * sum(size for _, size in sizes.values()) / max(1, sum(count for count, _ in sizes.values())),
        "file_bytes": file_bytes,
        **meter.costs.to_dict(),
    }


def recipe_of(row: str, model: Any, task: Any) -> Any:
    """A scheme for the decoder's linear weights, or the allocator's plan for everything."""
    import tersor

    budget = re.fullmatch(r"plan\(bits=([\d.]+)\)", row)
    if budget:
        return tersor.plan(model, task, bits=float(budget[1]), candidates=["keep", *CANDIDATES])
    *transforms, scheme = row.split(" | ")
    return tersor.Recipe.of(scheme, exclude=[KEPT], transforms=transforms)


def line(result: dict[str, Any]) -> str:
    bits = f"{result['bits']:.2f}" if result["bits"] else "16"
    row = result["row"].replace("|", "\\|")  # or it would end the cell
    return (
        f"| `{row}` | {bits} | {number(result['perplexity'])} | {result['kl']:.3f} "
        f"| {result['file_bytes'] / 1e6:.1f} | {result['cpu']:.0f} | {result['peak_rss'] / 1e6:.0f} |"
    )


def number(perplexity: float) -> str:
    """Three digits are what the evaluation can tell."""
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.1e}"


def page(done: dict[str, dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    head = "| scheme | bits | perplexity | KL | file MB | CPU s | peak MB |\n|---|---|---|---|---|---|---|"
    sections = {"The original": ["keep"], **SECTIONS}
    tables = [
        "\n".join([f"## {title}", "", head, *(line(done[row]) for row in rows if row in done)])
        for title, rows in sections.items()
        if any(row in done for row in rows)
    ]
    listing = "\n\n".join(tables)
    return f"""# SmolLM2-135M-Instruct: methods and formats

Command: `python benchmarks/smollm2.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}).

A scheme is over all linear weights of the decoder; embeddings and head stay as they are, in bf16. `plan(bits=B)` is the
allocator's choice among `{CANDIDATES[0]}` to `{CANDIDATES[-1]}` for a file of B bits per parameter, embeddings and head
inside. Calibration: 32 windows of 512 tokens of WikiText-2 valid. Perplexity and KL to the original (nats per token):
first 8,192 tokens of WikiText-2 test, windows of 512, float32, from the saved file. Differences of perplexity under 3 %
are noise. Bits are per compressed weight, with scales; the file is the whole weights file. CPU seconds are of planning,
calibration and compression together; peak memory is of that process.

{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
