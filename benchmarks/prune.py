"""Prune while training, then quantize what is left: ResNet-20 on CIFAR-10, LeNet-300-100 and LeNet-5 on MNIST.

    python benchmarks/prune.py --assets FOLDER [--rows ROW ...] [--epochs N] [--results FILE] [--write]

A row is `MODEL SPARSITY`. The model (ResNet-20 as it was trained by others, the LeNets trained here first) is pruned
by the step `prune`; then what is left is stored by the method `zero-mask` in every format of FORMATS, loaded back from
the file and tested on all 10,000 test images. Results are appended to FILE (JSON lines), so that a run that was stopped
goes on where it was; `--write` puts everything in FILE into prune.md.
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
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.nn.sites import find_sites
from tersor.tasks.contract import Task
from tersor.training import FinetuneStep, Job

TOLERANCE = Tolerance(0.005, relative=False)  # half a point
FORMATS = ("bitmask+int8", "bitmask+int6", "bitmask+int5", "bitmask+int4-g64")
TUNED = {"resnet-20 50%": ("bitmask+int4-g64",)}  # where the step tune-scales follows
ROWS = [
    *(f"{model} {sparsity}%" for model in ("lenet-300-100", "lenet-5") for sparsity in (50, 75, 90)),
    *(f"resnet-20 {sparsity}%" for sparsity in (50, 62, 72)),
]
KINDS: dict[str, type[nn.Module]] = {"lenet-300-100": LeNet300100, "lenet-5": LeNet5, "resnet-20": ResNetCifar}
DIGITS = {"batch_size": 128, "learning_rate": 1e-3, "num_evaluations": 0}
IMAGES = {"batch_size": 128, "learning_rate": 0.02, "optimizer": "sgd", "weight_decay": 1e-4, "precision": "bf16"}
TRAINING = {"lenet-300-100": {**DIGITS, "epochs": 12}, "lenet-5": {**DIGITS, "epochs": 8}}
TUNING = {"epochs": 1, "batch_size": 128, "learning_rate": 1e-3, "precision": "bf16", "num_evaluations": 0}
RECOVERY: dict[str, dict[str, Any]] = {
    "lenet-300-100": {**DIGITS, "epochs": 6},
    "lenet-5": {**DIGITS, "epochs": 4},
    # The original teaches beside the labels.
    "resnet-20": {**IMAGES, "num_evaluations": 0, "epochs": 4, "alpha": 0.3, "temperature": 4.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--epochs", type=float, help="of every training; default: those of the table")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-prune.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    for row in args.rows:
        if row not in results:
            found = measure(row, args.assets, args.epochs, args.results.with_suffix(".models"))
            print("\n".join(lines(results.add(row, found))), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results.among(ROWS)))
    return 0


def measure(row: str, assets: Path, epochs: float | None, folder: Path) -> dict[str, Any]:
    """Prune once, and store in every format."""
    name, _, text = row.partition(" ")
    sparsity = float(text.removesuffix("%")) / 100
    task = open_cifar(assets) if name == "resnet-20" else open_mnist(assets)
    model, file_bytes = open_original(name, assets, task, epochs, folder)
    original = task.score(model)
    began = time.process_time()
    fields = RECOVERY[name] | ({"epochs": epochs} if epochs else {})
    prune = {"step": "prune", "sparsity": sparsity, **fields}
    pruned = tersor.compress(model, tersor.Recipe.model_validate({"steps": [prune]}), task).model
    cpu = time.process_time() - began
    scores = task.score(pruned)
    return {
        "row": row,
        "original": {"accuracy": original.value, "bytes": file_bytes},
        "pruned": {"accuracy": scores.value, "verdict": judge(original, scores, TOLERANCE).to_dict(), "cpu": cpu},
        "zeros": share_of_zeros(pruned),
        "stored": [
            store(format, tuned, pruned, task, original, KINDS[name]())
            for formats, tuned in ((FORMATS, {}), (TUNED.get(row, ()), TUNING | ({"epochs": epochs} if epochs else {})))
            for format in formats
        ],
    }


def open_original(name: str, assets: Path, task: Task, epochs: float | None, folder: Path) -> tuple[nn.Module, int]:
    """The trained float32 model, and the size of its file. A LeNet is trained the first time."""
    if name == "resnet-20":
        return open_resnet(assets), resnet_file(assets).stat().st_size
    model, path = fresh(KINDS[name], seed=0), folder / f"{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        FinetuneStep(**TRAINING[name] | ({"epochs": epochs} if epochs else {})).run(Job(model, model, task))
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model, path.stat().st_size


def store(
    format: str, tuning: dict[str, Any], pruned: nn.Module, task: Task, original: Any, empty: nn.Module
) -> dict[str, Any]:
    """Write the pruned model in a format, its scales, biases and norms trained once more where `tuning` says how; load
    the file, and judge it."""
    steps = [{"scheme": f"zero-mask:{format}"}, *([{"step": "tune-scales", **tuning}] if tuning else [])]
    began = time.process_time()
    made = tersor.compress(pruned, tersor.Recipe.model_validate({"steps": steps}), task if tuning else None)
    cpu = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(made.model, folder)
        loaded = tersor.load(folder, model=empty)
        num_bytes = (Path(folder) / "model.safetensors").stat().st_size
    scores = task.score(loaded)
    num_weights = sum(site.shape[0] * site.shape[1] for site in made.sites)
    return {
        "format": f"zero-mask:{format}" + (", tune-scales" if tuning else ""),
        "cpu": cpu,
        "bytes": num_bytes,
        "bits": 8 * sum(site.num_bytes for site in made.sites) / num_weights,
        "accuracy": scores.value,
        "verdict": judge(original, scores, TOLERANCE).to_dict(),
    }


def share_of_zeros(model: nn.Module) -> float:
    matrices = [site.matrix(model) for site in find_sites(model)]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


def lines(result: dict[str, Any]) -> list[str]:
    """The table's: the original, pruned in float32, and stored in every format."""
    original, pruned, name = result["original"], result["pruned"], result["row"]
    head = f"| {name} | float32, {result['zeros']:.1%} zeros | | {original['bytes'] / 1000:.1f} | 1.00 "
    return [f"{head}| {judged(pruned)} |"] + [
        f"| {name} | {stored['format'].removeprefix('zero-mask:')} | {stored['bits']:.2f} "
        f"| {stored['bytes'] / 1000:.1f} "
        f"| {original['bytes'] / stored['bytes']:.2f} | {judged(stored)} |"
        for stored in result["stored"]
    ]


def judged(measured: dict[str, Any]) -> str:
    low, high = measured["verdict"]["drop_interval"]
    return (
        f"{100 * measured['accuracy']:.2f} | {100 * measured['verdict']['drop']:+.2f} "
        f"[{100 * low:+.2f}, {100 * high:+.2f}] {measured['verdict']['outcome']}"
    )


def page(results: list[dict[str, Any]]) -> str:
    about = machine()
    listing = "\n".join(line for result in results for line in lines(result))
    originals = {result["row"].split()[0]: result["original"] for result in results}
    listed = "\n".join(
        f"| {name} | {100 * original['accuracy']:.2f} | {original['bytes'] / 1000:.1f} |"
        for name, original in originals.items()
    )
    recoveries = "\n".join(
        f"- {name}: {', '.join(f'{field} {value}' for field, value in fields.items() if field != 'num_evaluations')}; "
        f"{', '.join(cpu_of(result) for result in results if result['row'].split()[0] == name)} CPU s"
        for name, fields in RECOVERY.items()
        if name in originals
    )
    return f"""# Prune, fine-tune, quantize

Command: `python benchmarks/prune.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}; {about["processor"]}
({about["cpu_capability"]}), one thread.

| original | accuracy % | file, kB |
|---|---|---|
{listed}

The file is the whole weights file: header, biases, and for ResNet-20 11 kB of batch norms in float32 are inside. `bits`
are per weight, with the mask and the scales; `smaller` is against the original's file. Accuracy is on all 10,000 test
images, of the file loaded back; its drop against the original is in points, with the 90 % interval judged at a
tolerance of 0.5 points. All weights of the model are pruned, first and last layer too, under one threshold. What is
left is stored by `zero-mask`; after `tune-scales`, scales, biases and norms were trained once more, for one epoch.

Half of the weights in int8 take `1 + 8 / 2 = 5` bits, 6.4 times less than float32: 8 times need fewer bits (4 bits are
6-bit codes at half density) or fewer weights (37 % left in 8 bits), and a little more for what else is in the file.

| model, sparsity | stored as | bits | kB | smaller | accuracy % | drop, verdict |
|---|---|---|---|---|---|---|
{listing}

Training:

{recoveries}
"""


def cpu_of(result: dict[str, Any]) -> str:
    return f"{result['row'].split()[1]} {result['pruned']['cpu']:.0f}"


if __name__ == "__main__":
    sys.exit(main())
