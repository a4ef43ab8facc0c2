"""SmolLM2-135M-Instruct, entropy-coded at one noise level: perplexity at the bits that the file really takes.

    python benchmarks/coded_smollm2.py --assets FOLDER [--bits B ...] [--results FILE] [--write]

`linear B`: the level at which the decoder's linear weights take B bits each, embeddings and head kept; the bytes are
those of `model.tersor` less what the kept tensors take in it. `whole B`: B bits a weight over all of them, embeddings
and head inside. Levels come from the forecast and are not refined, so that each row is one model; the table says what
the file takes. All rows run in one process, which gathers the statistics once. The protocol is that of protocol.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
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
from rows import Results, child_environment, last_line

ROWS = ["linear 4", "linear 3", "linear 2.5", "linear 2", "whole 4", "whole 3"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-smollm2.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        measure(args.rows, assets, args.results)
        return 0
    left = [row for row in args.rows if row not in Results(args.results)]
    failed = 0
    if left:
        command = [sys.executable, __file__, *assets.options, "--run", "--results", str(args.results), "--rows", *left]
        child = subprocess.run(command, env=child_environment(1), stderr=subprocess.PIPE)
        failed = child.returncode
        if failed:
            print(last_line(child.stderr), file=sys.stderr)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(Results(args.results).among(ROWS)))
    return int(failed != 0)


def measure(rows: list[str], assets: Assets, results: Path) -> None:
    """Compress, save, load and score one row after the other; what is done is appended to the results."""
    import tersor
    from tersor.budget.level import Searching
    from tersor.calibrate import gather
    from tersor.checkpoint.container import Container
    from tersor.checkpoint.layout import CODED
    from tersor.checkpoint.source import open_model
    from tersor.recipe import Recipe
    from tersor.schemes import KEEP

    source, task, original = open_model(str(assets.model)), open_protocol(assets), open_original(assets)
    with Meter() as gathering:
        stats = gather(source.model, task)
    for row in rows:
        kind, bits = row.split()
        step = Recipe.of(KEEP, exclude=[KEPT] if kind == "linear" else []).weights[0]
        with Meter() as meter:
            searching = Searching(source.model, task, step, stats)
            found = searching.make(searching.foresee().level_of(float(bits)))
        with tempfile.TemporaryDirectory() as folder:
            tersor.save(found.made.model, folder, source=assets.model)
            container = Container(Path(folder) / CODED)
            parts = {f"{site.name}.weight" for site in found.made.sites}
            kept = [name for name in container.entries if name.rpartition(".")[0] not in parts]
            kept_bytes = sum(map(container.stored_bytes, kept))
            file_bytes = (Path(folder) / CODED).stat().st_size
            loaded = tersor.load(folder, packed=False).float()
        num_weights = sum(site.shape[0] * site.shape[1] for site in found.made.sites)
        result = {
            "row": row,
            **asdict(evaluate(loaded, original, task)),
            "bits": 8 * (file_bytes - kept_bytes) / num_weights,
            "file_bytes": file_bytes,
            "scheme": found.recipe.weights[0].scheme,
            **meter.costs.to_dict(),
            "gathering": gathering.costs.cpu,
        }
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(line(result), flush=True)


def line(result: dict[str, Any]) -> str:
    return (
        f"| {result['row']} | `{result['scheme']}` | {result['bits']:.3f} | {result['perplexity']:.2f} "
        f"| {result['kl']:.3f} | {result['file_bytes'] / 1e6:.1f} | {result['cpu']:.0f} |"
    )


def page(results: list[dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about, listing = machine(), "\n".join(map(line, results))
    return f"""# SmolLM2-135M-Instruct, entropy-coded

Command: `python benchmarks/coded_smollm2.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}).

`linear B` asks the forecast for B bits a weight over the linear weights of the decoder (embeddings and head kept in
bf16), `whole B` over all weights. Bits are bytes of `model.tersor`, less those of the tensors that are kept; headers
and all side information are inside. Calibration: 32 windows of 512 tokens of WikiText-2 valid. Perplexity (29.60 in
float) and KL to the original (nats per token): first 8,192 tokens of WikiText-2 test, windows of 512, float32, from the
saved file. Differences of perplexity under 3 % are noise. CPU seconds are of forecast and compression; the curvature
took {results[0]["gathering"]:.0f} more, once.

| row | scheme | bits | perplexity | KL | file MB | CPU s |
|---|---|---|---|---|---|---|
{listing}

On the same protocol (smollm2.md, peers.md): `gptq:int4-g64` 31.8 at 4.25 bits, `autoround:int3-g64` 34.1 and
`gptq:int3-g64` 37.3 at 3.25, `autoround:int2-g64` 49.6 and `gptq:int2-g64` 65.4 at 2.25.
"""


if __name__ == "__main__":
    sys.exit(main())
