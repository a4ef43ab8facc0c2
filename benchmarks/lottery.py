"""Lottery tickets on MNIST: LeNet-300-100 pruned to 10 % and 5 % of its weights, rewound or drawn at random again.

    python benchmarks/lottery.py --assets FOLDER [--seeds 5] [--epochs N] [--rows ROW ...] [--results FILE] [--write]

For every seed: the step `lottery` down to each density, the same with `reinit: true` (the ticket's own mask over new
random weights, trained as long), and the dense network. Each network is tested on all 10,000 test digits. A row is
`SEED DENSITY KIND` and is appended to FILE (JSON lines), so that a run that was stopped goes on where it was; the
rounds that rows of a seed have in common are trained once. `--write` puts everything in FILE into lottery.md.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from models import LeNet300100, fresh, open_mnist
from rows import Results
from scipy.stats import binomtest, ttest_rel

from tersor.measure.scorecard import machine
from tersor.tasks.contract import Task
from tersor.training import FinetuneStep, Job, LotteryStep
from tersor.training.journal import Journal
from tersor.training.masks import sparsity_of

FRACTION = 1 - 0.1**0.1  # ten rounds to 10 %, thirteen to 5 %
DENSITIES = {"10%": 0.1, "5%": 0.1**1.3}
KINDS = ("ticket", "reinit")
SETTINGS = {  # of the paper for this network, but for the number of steps
    "batch_size": 60,
    "learning_rate": 1.2e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "clip_norm": None,
    "num_evaluations": 0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all, such as '0 10%% ticket'")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-lottery.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = open_mnist(args.assets)
    results = Results(args.results)
    for row in args.rows or rows(args.seeds):
        if row not in results or results[row]["epochs"] != args.epochs:
            found = results.add(row, measure(row, task, args.epochs, args.results.with_suffix(".rounds")))
            print(f"{row}: {found['accuracy']:.4f}, {found['cpu']:.0f} CPU s", flush=True)
    measured = [result for result in results.values() if result["epochs"] == args.epochs]
    print(table(measured))
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(measured, args))
    return 0


def rows(num_seeds: int) -> list[str]:
    """All of them; the dense network is the first training of the tickets."""
    return [f"{seed} {density} {kind}" for seed in range(num_seeds) for density in DENSITIES for kind in KINDS] + [
        f"{seed} 100% dense" for seed in range(num_seeds)
    ]


def measure(row: str, task: Task, epochs: float, folder: Path) -> dict[str, Any]:
    """Train as the row says; `folder` keeps the rounds that other rows of the seed go through as well."""
    began = time.process_time()
    seed, density, kind = row.split()
    model = fresh(LeNet300100, int(seed))
    job = Job(model, model, task, int(seed))
    if kind == "dense":
        FinetuneStep(**SETTINGS, epochs=epochs).run(job)
    else:
        job.journal = Journal(folder / f"seed-{seed}.safetensors", f"{seed} {epochs} {SETTINGS}")
        sparsity, reinit = 1 - DENSITIES[density], kind == "reinit"
        LotteryStep(**SETTINGS, epochs=epochs, fraction=FRACTION, sparsity=sparsity, reinit=reinit).run(job)
    scores = task.score(job.model)
    return {
        "row": row,
        "epochs": epochs,
        "accuracy": scores.value,
        "left": 1 - sparsity_of(job.masks) if job.masks.masks else 1.0,
        "num_rounds": len(job.curves) - 1,
        "right": np.packbits(scores.examples[:, 0].astype(bool)).tobytes().hex(),
        "cpu": time.process_time() - began,
    }


def right(result: dict[str, Any]) -> np.ndarray:
    """Which test digits it got right."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), np.uint8)).astype(bool)


def comparison(results: list[dict[str, Any]], density: str) -> str | None:
    """A line of the table of tests: the tickets against the controls of the same seeds."""
    by_row = {result["row"]: result for result in results}
    seeds = sorted({int(row.split()[0]) for row in by_row})
    pairs = [tuple(by_row.get(f"{seed} {density} {kind}") for kind in KINDS) for seed in seeds]
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) < 2:
        return None
    flips = [(int((right(a) & ~right(b)).sum()), int((~right(a) & right(b)).sum())) for a, b in pairs]
    mcnemar = [binomtest(won, won + lost).pvalue for won, lost in flips]
    won, lost = (sum(column) for column in zip(*flips, strict=True))
    gains = [100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs]
    over_seeds = ttest_rel([a["accuracy"] for a, _ in pairs], [b["accuracy"] for _, b in pairs]).pvalue
    return (
        f"| {density} | {len(pairs)} | {np.mean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f}) "
        f"| {', '.join(f'{p:.1e}' for p in mcnemar)} | {won} : {lost}, {binomtest(won, won + lost).pvalue:.1e} "
        f"| {over_seeds:.1e} |"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Accuracies, and the tests."""
    lines = ["| weights left | network | accuracy %, mean (of each seed) | rounds |", "|---|---|---|---|"]
    for what in ("100% dense", *(f"{density} {kind}" for density in DENSITIES for kind in KINDS)):
        found = [result for result in results if result["row"].split(" ", 1)[1] == what]
        if found:
            each = [100 * result["accuracy"] for result in found]
            lines.append(
                f"| {found[0]['left']:.2%} | {what.split()[1]} | {np.mean(each):.2f} "
                f"({', '.join(f'{accuracy:.2f}' for accuracy in each)}) | {found[0]['num_rounds']} |"
            )
    lines += [
        "",
        "| weights left | seeds | ticket - reinit, points | McNemar p of each seed | flips of all, p | t-test p |",
    ]
    lines += ["|---|---|---|---|---|---|", *filter(None, (comparison(results, density) for density in DENSITIES))]
    return "\n".join(lines)


def page(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    about = machine()
    num_seeds = len({result["row"].split()[0] for result in results})
    return f"""# Lottery tickets: LeNet-300-100 on MNIST

Command: `python benchmarks/lottery.py --assets FOLDER --seeds {num_seeds} --epochs {args.epochs:g} --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}; {about["processor"]}
({about["cpu_capability"]}), one thread.

Every training is {args.epochs:g} epochs of batches of {SETTINGS["batch_size"]} with Adam at
{SETTINGS["learning_rate"]}, as in Frankle & Carbin 2018 but shorter. A round drops {FRACTION:.1%} of the weights that
are left, the smallest of all layers together, and puts the others back to what they were before the first step.
`reinit` is the control: the ticket's mask over new random weights, trained as long. A seed fixes the initial weights
and the order of the data. Accuracy is on all 10,000 test digits, after the last step. McNemar's test (exact, two-sided)
is over the digits of one seed; "flips of all" counts digits that only the ticket and only the control gets right, over
all seeds; the t-test is paired over seeds, two-sided.

{table(results)}

CPU seconds of all rows together: {sum(result["cpu"] for result in results):.0f}. The rows of a seed share their rounds.
"""


if __name__ == "__main__":
    sys.exit(main())
