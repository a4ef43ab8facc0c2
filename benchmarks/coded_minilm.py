"""all-MiniLM-L6-v2, entropy-coded at one noise level: what the embeddings keep at the bytes the file really takes.

    python benchmarks/coded_minilm.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

`encoder B`: the linear weights (embeddings kept) at the level for which the forecast says B bits a weight; the bytes
are those of `model.tersor` less what the kept tensors take in it. `whole B`: all weights, embeddings inside, at B bits
a weight. Levels come from the forecast and are not refined, so that each row is one model; the table says what the file
takes. The protocol is that of minilm_quality.py: calibration on 128 pairs of STS-B dev, judged on the others. Rows are
appended to FILE (JSON lines), so that a run that was stopped goes on where it was; `--write` puts everything in FILE
into coded_minilm.md.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rows import Results
from torch import nn

import tersor
from tersor.analysis.divergence import divergence, outputs
from tersor.budget.level import Searching
from tersor.calibrate import gather
from tersor.checkpoint.container import Container
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.source import open_model
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.methods.waterfill import bound_at
from tersor.recipe import Recipe
from tersor.schemes import KEEP, Scheme
from tersor.scores import Scores
from tersor.stats import Stats
from tersor.tasks.contract import Task
from tersor.workflow import TaskChoice, open_task_for

ROWS = [
    *(f"encoder {bits}" for bits in (4, 3.5, 3, 2.5, 2, 1.5)),
    *(f"encoder {bits} 64" for bits in (4, 3.5, 3, 2.5, 2, 1.5)),
    *(f"encoder 3 {num_states}" for num_states in (4, 8, 16, 256)),
    *(f"whole {bits}" for bits in (8, 4.2, 3, 2, 1.5, 1)),
    *(f"whole {bits} 64" for bits in (8, 4.2, 3, 2, 1.5, 1)),
]
NUM_SENTENCES = 512  # whose embeddings are compared with the original's


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-minilm.jsonl")
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
        task = open_task_for(source, TaskChoice("similarity", data))
        original, stats = task.score(source.model), gather(source.model, task)
    for row in left:
        print(line(results.add(row, measure(row, source.model, folder, task, original, stats))), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results.among(ROWS)))
    return 0


def measure(
    row: str, model: nn.Module, folder: Path, task: Task, original: Scores, stats: dict[str, Stats]
) -> dict[str, Any]:
    """Forecast, compress, save, load, score."""
    began = time.process_time()
    kind, bits, num_states = [*row.split(), "0"][:3]
    step = Recipe.of(KEEP, exclude=["*embeddings*"] if kind == "encoder" else []).weights[0]
    searching = Searching(model, task, step, stats, num_states=int(num_states))
    forecast = searching.foresee()
    found = searching.make(forecast.level_of(float(bits)))
    seconds = time.process_time() - began
    scheme = found.recipe.weights[0].scheme
    with tempfile.TemporaryDirectory() as place:
        tersor.save(found.made.model, place, source=folder)
        container = Container(Path(place) / CODED)
        parts = {f"{site.name}.weight" for site in found.made.sites}
        kept_bytes = sum(container.stored_bytes(n) for n in container.entries if n.rpartition(".")[0] not in parts)
        file_bytes = (Path(place) / CODED).stat().st_size
        loaded = tersor.load(place, packed=False)
    scores = task.score(loaded)
    pair = [list(outputs(each, task, "eval", NUM_SENTENCES)) for each in (model, loaded)]
    return {
        "row": row,
        "scheme": scheme,
        "bytes": file_bytes,
        "bits": 8 * (file_bytes - kept_bytes) / forecast.num_weights,
        "bound": bound_at(forecast.counts, Scheme.parse(scheme).method.level) / forecast.num_weights,  # type: ignore[attr-defined]
        "distance": divergence(*pair, task.output),
        "predicted": forecast.num_weights * Scheme.parse(scheme).method.level ** 2 / 24,  # type: ignore[attr-defined]
        "spearman": scores.value,
        "verdict": judge(original, scores, Tolerance.parse("1%")).to_dict(),
        "seconds": seconds,
    }


def line(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    low, high = verdict["drop_interval"]
    return (
        f"| {result['row']} | `{result['scheme']}` | {result['bits']:.3f} | {result['bits'] - result['bound']:+.2f} "
        f"| {result['bytes'] / 1e6:.2f} | {result['distance']:.4f} | {result['predicted']:.4f} "
        f"| {result['spearman']:.4f} | {verdict['drop']:+.4f} [{low:+.4f}, {high:+.4f}] {verdict['outcome']} "
        f"| {result['seconds']:.0f} |"
    )


def page(results: list[dict[str, Any]]) -> str:
    about, listing = machine(), "\n".join(map(line, results))
    return f"""# all-MiniLM-L6-v2, entropy-coded

Command: `python benchmarks/coded_minilm.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}).

`encoder B` asks the forecast for B bits a weight over the linear weights (embeddings kept in fp32), `whole B` over all
weights, embeddings inside. Bits are bytes of `model.tersor`, less those of the tensors that are kept; headers and all
side information are inside. The gap is to the rate-distortion function of normal weights with these deviations at the
level's error: 0.25 bits is what scalar codes leave at best where many bits are spent. 1 - cosine to the original's
embeddings is over {NUM_SENTENCES} sentences, predicted is `level^2 / 24` for every weight. Spearman and its drop, with
the 90 % interval judged at 1 %, are over 1,372 pairs of STS-B dev; 128 others are for calibration. CPU seconds are of
forecast and compression.

| row | scheme | bits | gap | MB | 1 - cosine | predicted | Spearman | drop, verdict | CPU s |
|---|---|---|---|---|---|---|---|---|---|
{listing}

On the same protocol (minilm_quality.md), over the linear weights: `gptq:int4-g64` .0107 at 4.25 bits, `gptq:int3-g64`
.0393 at 3.25, `gptq:int2-g64` .1310 at 2.25; whole files by `plan`: 12.98 MB .0099, 9.09 MB .0475, 7.57 MB .0828.
"""


if __name__ == "__main__":
    sys.exit(main())
