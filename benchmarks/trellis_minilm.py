"""What a trellis gains on all-MiniLM-L6-v2: bits of real files at equal embeddings.

    python benchmarks/trellis_minilm.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

`encoder B N`: the linear weights (embeddings kept) at the level for which the forecast says B bits a weight, along the
paths of a trellis of N states; `whole B N`: all weights; N = 0 is steps alone. Bits are bytes of `model.tersor`, less
those of the tensors that are kept. The protocol is that of minilm_quality.py: calibration on 128 pairs of STS-B dev,
1 - cosine to the original's embeddings over 512 of the others, from the saved file. The gain is what steps alone take
more at the same 1 - cosine, on the line through their own rows (its logarithm against bits). Rows are appended to FILE
(JSON lines), so that a run that was stopped goes on where it was; `--write` puts them into trellis_minilm.md.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from coded_minilm import NUM_SENTENCES, at_forecast
from rows import Results

from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.divergence import divergence, outputs
from tersor.checkpoint.open import open_model
from tersor.measure.scorecard import machine
from tersor.tasks.data import Data

ENCODER, WHOLE = (4, 3, 2, 1.5), (4, 3, 2, 1.5)
ROWS = [
    *(f"encoder {bits} {num_states}" for num_states in (0, 4, 8, 64, 256) for bits in ENCODER),
    *(f"whole {bits} {num_states}" for num_states in (0, 64) for bits in WHOLE),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-trellis-minilm.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, folder = args.assets / "text" / "stsb-dev.csv", args.assets / "minilm"
    if not data.exists() or not (folder / "config.json").exists():
        print(f"needs {data} and {folder}: give --assets FOLDER", file=sys.stderr)
        return 2
    results = Results(args.results)
    left = [row for row in args.rows if row not in results]
    if left:
        source = open_model(str(folder))
        task = Data("similarity", data).open(source)
        stats = estimate_fisher(source.model, task)
        original = list(outputs(source.model, task, "eval", NUM_SENTENCES))
    for row in left:
        loaded, facts = at_forecast(source.model, folder, task, stats, row)
        after = list(outputs(loaded, task, "eval", NUM_SENTENCES))
        results.add(row, facts | {"distance": divergence(original, after, task.output)})
        print(line(results[row], results), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return 0


def gain(result: dict[str, Any], results: Results) -> float | None:
    """Bits that steps alone take more at the same 1 - cosine; None where their rows do not reach it."""
    kind, _, num_states = result["row"].split()
    alone = [results[row] for row in results if row.startswith(kind) and row.endswith(" 0")]
    alone.sort(key=lambda each: each["distance"])
    logs = np.log([each["distance"] for each in alone])
    wanted = np.log(result["distance"])
    if num_states == "0" or len(alone) < 2 or not logs[0] <= wanted <= logs[-1]:
        return None
    return float(np.interp(wanted, logs, [each["bits"] for each in alone])) - result["bits"]


def line(result: dict[str, Any], results: Results) -> str:
    gained = gain(result, results)
    in_percent = "" if gained is None else f"{gained:.3f} ({100 * gained / (result['bits'] + gained):.1f} %)"
    return (
        f"| {result['row']} | `{result['scheme']}` | {result['bits']:.3f} | {result['bytes'] / 1e6:.2f} "
        f"| {result['distance']:.4f} | {in_percent} |"
    )


def page(results: Results) -> str:
    about, listing = machine(), "\n".join(line(result, results) for result in results.among(ROWS))
    return f"""# all-MiniLM-L6-v2 along the paths of a trellis

Command: `python benchmarks/trellis_minilm.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}).

`encoder B N` asks the forecast for B bits a weight over the linear weights (embeddings kept in fp32), `whole B N` over
all weights, with N states of a trellis; 0 is steps alone. Bits are bytes of `model.tersor`, less those of the tensors
that are kept; headers and all side information are inside. 1 - cosine to the original's embeddings is over
{NUM_SENTENCES} sentences, from the saved file. The gain is what steps alone take more at the same 1 - cosine, on the
line through their own rows. Each row is one model.

| row | scheme | bits | MB | 1 - cosine | gain in bits |
|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
