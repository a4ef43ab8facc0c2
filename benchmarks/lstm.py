"""LSTM and GRU in int8 with inputs quantized as they come: accuracy of a trained one, and speed against PyTorch's own.

    python benchmarks/lstm.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

The trained one reads MNIST digits row by row (28 steps of 28 numbers, 512 hidden units). Speed is measured at several
widths, float and int8 in turn in one process, on one thread, in CPU time. Each row runs in a process of its own and is
appended to FILE (JSON lines), so that a run that was stopped goes on where it was; `--write` puts everything in FILE
into benchmarks/lstm.md. FOLDER (or TERSOR_ASSETS) holds what models.py names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Meter
from rows import Results, run_rows
from torch import Tensor, nn

HIDDEN, NUM_TRAIN, NUM_EPOCHS, BATCH, RATE = 512, 25_600, 2, 128, 2e-3
SPEEDS = {f"{kind} {width}": (kind, width) for kind in ("LSTM", "GRU") for width in (256, 384, 512, 1024)}
NUM_STEPS, NUM_WARM, NUM_ROUNDS = 28, 3, 60
ROWS = ("MNIST rows", *SPEEDS)


class RowReader(nn.Module):
    """Images `[row, 1, 28, 28]`, read from the top, to logits `[row, 10]`."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-lstm.jsonl")
    parser.add_argument("--share", type=float, default=1.0, help="of the training images")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        made = measure_speed(*SPEEDS[args.run]) if args.run in SPEEDS else measure_digits(args.assets, args.share)
        print(json.dumps({"row": args.run, **made}))
        return 0
    results = Results(args.results)
    complete = run_rows(args.rows, results, ["--assets", args.assets, "--share", args.share])
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


def measure_digits(assets: Path, share: float) -> dict[str, Any]:
    """Train, compress, write, read back, judge on all 10,000 test digits, and time."""
    from models import open_mnist

    import tersor
    from tersor.checkpoint.container_write import size_of
    from tersor.measure.verdict import Tolerance, judge

    task = open_mnist(assets)
    with Meter() as meter:
        model = trained(assets, share)
    small = tersor.compress(model, tersor.Recipe.of("int8-dynamic")).model
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(small, folder)
        small = tersor.load(folder, model=RowReader())
    before, after = task.score(model), task.score(small)
    return {
        "accuracy": [before.value, after.value],
        "verdict": judge(before, after, Tolerance.parse("1%")).to_dict(),
        "bytes": [size_of(model), size_of(small)],
        "training_cpu": meter.costs.cpu,
        "latency": [latency(model, small, torch.rand(size, 1, 28, 28)) for size in (1, 32)],
    }


def trained(assets: Path, share: float) -> RowReader:
    """Adam with a cosine from its rate to zero, on the first images of the train split."""
    from models import existing

    data = np.load(existing(assets / "vision" / "mnist.npz"))
    num = max(BATCH, round(share * NUM_TRAIN))
    x, y = (torch.from_numpy(data[name][:num]) for name in ("x_train", "y_train"))
    torch.manual_seed(0)
    model = RowReader()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_EPOCHS * (num // BATCH))
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(num)[: num // BATCH * BATCH].view(-1, BATCH):
            loss = nn.functional.cross_entropy(model(x[rows].float().unsqueeze(1) / 255), y[rows].long())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def measure_speed(kind: str, width: int) -> dict[str, Any]:
    """A layer with random weights, as wide as its inputs."""
    import tersor

    torch.manual_seed(0)
    model = nn.Sequential(getattr(nn, kind)(width, width, batch_first=True)).eval()
    small = tersor.compress(model, tersor.Recipe.of("int8-dynamic")).model
    x = torch.randn(32, NUM_STEPS, width)
    with torch.inference_mode():
        exact, y = model(x)[0], small(x)[0]
    error = ((y - exact).norm() / exact.norm()).item()
    return {"error": error, "latency": [latency(model, small, x[:size]) for size in (1, 32)]}


def latency(model: nn.Module, small: nn.Module, x: Tensor) -> dict[str, Any]:
    """CPU time of both, in turn; how many times less the second takes: the median over rounds, with a 95 % interval."""
    with torch.inference_mode():
        rounds = [[cpu_of(each, x) for each in (model, small)] for _ in range(NUM_WARM + NUM_ROUNDS)][NUM_WARM:]
    times = np.array(rounds)
    ratios = times[:, 0] / times[:, 1]
    picks = np.random.default_rng(0).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {
        "batch": len(x),
        "milliseconds": (1e3 * np.median(times, axis=0)).tolist(),
        "speedup": float(np.median(ratios)),
        "interval": [float(low), float(high)],
    }


def cpu_of(model: nn.Module, x: Tensor) -> float:
    """CPU seconds of one call: what others run in between does not count."""
    started = time.process_time()
    model(x)
    return time.process_time() - started


def cells(latencies: list[dict[str, Any]]) -> str:
    return " | ".join(
        f"{each['milliseconds'][0]:.2f} | {each['milliseconds'][1]:.2f} | "
        f"{each['speedup']:.2f}x [{each['interval'][0]:.2f}, {each['interval'][1]:.2f}]"
        for each in latencies
    )


def page(done: dict[str, dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    digits = done.get("MNIST rows")
    table = "\n".join(
        f"| {row} | {cells(done[row]['latency'])} | {done[row]['error']:.4f} |" for row in SPEEDS if row in done
    )
    heads = "| float ms | int8 ms | speed-up "
    story = ""
    if digits:
        verdict = digits["verdict"]
        low, high = verdict["drop_interval"]
        story = f"""## MNIST, row by row

{HIDDEN} hidden units, {NUM_EPOCHS} epochs of {NUM_TRAIN:,} images, {digits["training_cpu"]:.0f} CPU seconds; judged
on all 10,000 test images after saving and reading back.

| | float | int8-dynamic |
|---|---|---|
| accuracy | {digits["accuracy"][0]:.4f} | {digits["accuracy"][1]:.4f} |
| weights file, MB | {digits["bytes"][0] / 1e6:.2f} | {digits["bytes"][1] / 1e6:.2f} |

Drop {verdict["drop"]:+.4f} [{low:+.4f}, {high:+.4f}]: {verdict["outcome"]} 1 %.

{heads}at batch 1 {heads}at batch 32 |
|---|---|---|---|---|---|
| {cells(digits["latency"])} |

"""
    return f"""# LSTM and GRU in int8

Command: `python benchmarks/lstm.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}; {about["processor"]}
({about["cpu_capability"]}), one thread, on a machine that others used too: float (PyTorch's own layer) and int8 run in
turn in one process. Milliseconds are of CPU time; the ratio is the median over rounds with its 95 % interval.

{story}## Speed by width

One layer as wide as its inputs, {NUM_STEPS} steps. Error: of all outputs, relative, random weights and inputs.

| layer {heads}at batch 1 {heads}at batch 32 | error |
|---|---|---|---|---|---|---|---|
{table}

A step of a narrow layer is so little work that the calls around it take most of its time. Below about 384 hidden units
packing the weights alone (`int8`), which runs in PyTorch's own layer, is the better choice at batch 1.
"""


if __name__ == "__main__":
    sys.exit(main())
