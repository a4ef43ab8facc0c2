"""Deep Compression today: prune, retrain, share steps, code. LeNets on MNIST; ResNet-20 on CIFAR-10, not pruned.

    python benchmarks/coded_vision.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

A row is `MODEL SPARSITY LEVEL`. The LeNets are trained here first, pruned by the step `prune` with the original as
teacher beside the labels, coded by `waterfill(level=LEVEL):coded`, and their scales tuned for an epoch: the recipe of
docs/coded.md. ResNet-20 comes as it was trained by others, and its rows, `resnet-20 0% LEVEL`, need no training. Every
file is loaded back and tested on all 10,000 test pictures. In place of a level stands a size that the search for it is
to meet. Results are appended to FILE (JSON lines), so that a run
that was stopped goes on where it was; models that rows share are kept beside it. `--write` puts everything in FILE into
coded_vision.md.
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
from models import LeNet5, LeNet300100, ResNetCifar, fresh, open_cifar, open_mnist, open_resnet, resnet_file
from rows import Results
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.budget.level import Searching
from tersor.budget.limit import Limit, parse_size
from tersor.calibrate import gather
from tersor.checkpoint.layout import CODED
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.tasks.contract import Task
from tersor.training import FinetuneStep, Job

TOLERANCE = Tolerance(0.003, relative=False)  # 0.3 points
KINDS: dict[str, type[nn.Module]] = {"lenet-300-100": LeNet300100, "lenet-5": LeNet5, "resnet-20": ResNetCifar}
DIGITS = {"batch_size": 128, "learning_rate": 1e-3, "num_evaluations": 0}
TRAINING = {"lenet-300-100": {**DIGITS, "epochs": 12}, "lenet-5": {**DIGITS, "epochs": 8}}
TAUGHT = {**DIGITS, "alpha": 0.5, "temperature": 3.0}
PRUNING: dict[str, dict[str, Any]] = {
    "lenet-300-100": {**TAUGHT, "epochs": 20, "learning_rate": 2e-3},
    "lenet-5": {**TAUGHT, "epochs": 8, "learning_rate": 2e-3},
}
TUNING = {**TAUGHT, "epochs": 1}
ROWS = [
    *(f"lenet-300-100 95% {level}" for level in ("2e-3", "5e-3", "8e-3")),
    *(f"lenet-5 97% {level}" for level in ("1e-3", "2e-3", "5e-3")),
    "resnet-20 0% 3e-3",
    *(f"resnet-20 0% {size}" for size in ("150kB", "110kB", "95kB", "75kB")),
]
PAPER = {"lenet-300-100": "27 kB, 40x", "lenet-5": "44 kB, 39x", "resnet-20": ""}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-vision.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    for row in args.rows:
        if row not in results:
            found = measure(row, args.assets, args.results.with_suffix(".models"))
            print(line(results.add(row, found)), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(list(results.values())))
    return 0


def measure(row: str, assets: Path, folder: Path) -> dict[str, Any]:
    """Prune where asked, code, tune, load the file back, and judge it."""
    name, percent, level = row.split()
    sparsity = float(percent.removesuffix("%")) / 100
    folder.mkdir(parents=True, exist_ok=True)
    task = open_cifar(assets, calibration_examples=512) if name == "resnet-20" else open_mnist(assets)
    model, file_bytes = open_original(name, assets, task, folder)
    original = task.score(model)
    pruned, cpu = open_pruned(name, sparsity, model, task, folder)
    began = time.process_time()
    stats = gather(pruned, task)
    if level.endswith("kB"):
        searching = Searching(pruned, task, tersor.Recipe.of("keep").weights[0], stats)
        made = searching.within(Limit(parse_size(level), level)).made
    else:
        steps: list[dict[str, Any]] = [{"scheme": f"waterfill(level={level}):coded"}]
        if sparsity:
            steps.append({"step": "tune-scales", **TUNING})
        made = tersor.compress(pruned, tersor.Recipe.model_validate({"steps": steps}), task, stats=stats)
    cpu += time.process_time() - began
    with tempfile.TemporaryDirectory() as artifact:
        tersor.save(made.model, artifact)
        loaded = tersor.load(artifact, model=KINDS[name]())
        num_bytes = (Path(artifact) / CODED).stat().st_size
    scores = task.score(loaded)
    return {
        "row": row,
        "original": {"accuracy": original.value, "bytes": file_bytes},
        "bytes": num_bytes,
        "bits": 8 * num_bytes / sum(parameter.numel() for parameter in model.parameters()),
        "pruned": task.score(pruned).value,
        "accuracy": scores.value,
        "verdict": judge(original, scores, TOLERANCE).to_dict(),
        "cpu": cpu,
    }


def open_original(name: str, assets: Path, task: Task, folder: Path) -> tuple[nn.Module, int]:
    """The trained float32 model, and the size of its file. A LeNet is trained the first time."""
    if name == "resnet-20":
        return open_resnet(assets), resnet_file(assets).stat().st_size
    model, path = fresh(KINDS[name], seed=0), folder / f"{name}.safetensors"
    if not path.exists():
        FinetuneStep(**TRAINING[name]).run(Job(model, model, task))
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model, path.stat().st_size


def open_pruned(name: str, sparsity: float, model: nn.Module, task: Task, folder: Path) -> tuple[nn.Module, float]:
    """The pruned model, and the CPU seconds that pruning took. It is pruned the first time."""
    if not sparsity:
        return model, 0.0
    path, began = folder / f"{name}-{sparsity}.safetensors", time.process_time()
    if not path.exists():
        step = {"step": "prune", "sparsity": sparsity, **PRUNING[name]}
        made = tersor.compress(model, tersor.Recipe.model_validate({"steps": [step]}), task)
        save_file(made.model.state_dict(), path)
    pruned = KINDS[name]().eval()
    pruned.load_state_dict(load_file(path))
    return pruned, time.process_time() - began


def line(result: dict[str, Any]) -> str:
    verdict, name = result["verdict"], result["row"].split()[0]
    low, high = (100 * edge for edge in verdict["drop_interval"])
    return (
        f"| {result['row']} | {result['bytes'] / 1e3:.1f} | {result['original']['bytes'] / result['bytes']:.1f} "
        f"| {result['bits']:.3f} | {100 * result['original']['accuracy']:.2f} | {100 * result['pruned']:.2f} "
        f"| {100 * result['accuracy']:.2f} | {100 * verdict['drop']:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"{verdict['outcome']} | {PAPER[name]} |"
    )


def page(results: list[dict[str, Any]]) -> str:
    about, listing = machine(), "\n".join(map(line, results))
    return f"""# Deep Compression: prune, retrain, share steps, code

Command: `python benchmarks/coded_vision.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}; {about["processor"]}
({about["cpu_capability"]}), one thread.

A row is the model, the share of weights pruned, and the level of `waterfill`, the same for all sites, or the size for
which the search chose it, corrected by what each site costs. kB are of the whole file `model.tersor`:
header, biases, norms and tables are inside; `smaller` is against the original's float32 file, bits are over all
parameters. Accuracy is on all 10,000 test pictures, of the file loaded back; its drop against the original is in
points, with the 90 % interval judged at a tolerance of 0.3 points. The last column is the table of the paper (Han et
al. 2016).

| model, pruned, level | kB | smaller | bits | original % | pruned % | coded % | drop, verdict | paper |
|---|---|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
