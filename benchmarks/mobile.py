"""CNNs exported to ExecuTorch: accuracy of the `.pte` files themselves, megabytes and latency on XNNPACK.

    python benchmarks/mobile.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

ResNet-20 is scored on the whole CIFAR-10 test set, EfficientNet-Lite0 by its agreement with the fp32 file on enlarged
images of CIFAR-10 (static_int8.py makes them). Each row is compressed and exported as fp32 and as int8 into a folder
beside FILE, where the files are found again; they are scored and timed in a process of its own, in turn, beside
PyTorch. A row is appended to FILE (JSON lines), so that a run that was stopped goes on where it was. `--write` puts
everything in FILE into mobile.md. FOLDER (or TERSOR_ASSETS) holds what models.py names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from models import open_cifar, open_efficientnet, open_resnet
from rows import Results, in_turn, run_rows
from static_int8 import NUM_CALIBRATION, large_images

ROWS = ("ResNet-20", "EfficientNet-Lite0")
RECIPE: dict[str, Any] = {"scheme": "int8/int8-static", "transforms": ["fold-bn"]}
BATCHES = {"ResNet-20": (1, 32), "EfficientNet-Lite0": (1,)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-mobile.jsonl")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set that are judged")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing at each batch size, at least 15 rounds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run, args.assets, args.results, args.images, args.seconds)))
        return 0
    results = Results(args.results)
    options = [
        "--assets",
        args.assets,
        "--results",
        args.results,
        "--images",
        args.images,
        "--seconds",
        args.seconds,
    ]
    complete = run_rows(args.rows, results, options, show=line)
    if args.write and results:
        Path(__file__).with_suffix(".md").write_text(page(results.among(ROWS)))
    return int(not complete)


def measure(row: str, assets: Path, results: Path, num_images: int, seconds: float) -> dict[str, Any]:
    """Compress and export one row where that was not done before; score and time it."""
    import torch

    from tersor.measure.verdict import Tolerance, judge
    from tersor.runtimes import runtime_named

    torch.set_num_threads(1)
    model, task = opened(row, assets, results, num_images)
    folder = results.with_name(f"{results.stem}-{row}")
    if not (folder / "notes.json").exists():
        folder.mkdir(exist_ok=True)
        (folder / "notes.json").write_text(json.dumps(written(model, task, folder)))
    runtime, paths = runtime_named("executorch"), {kind: folder / f"{kind}.pte" for kind in ("fp32", "int8")}
    sessions = {kind: runtime.open(path) for kind, path in paths.items()}
    before, after = (scores(session, task) for session in sessions.values())
    shape = next(iter(next(iter(task.batches("eval", 1))).inputs.values())).shape[1:]
    return {
        "notes": json.loads((folder / "notes.json").read_text()),
        "bytes": [path.stat().st_size for path in paths.values()],
        "metric": before.metric.name,
        "scores": [before.value, after.value],
        "num_examples": len(before.examples),
        "verdict": judge(before, after, Tolerance.parse("0.2%")).to_dict(),
        "latency": {str(batch): times(model, sessions, (batch, *shape), seconds) for batch in BATCHES[row]},
        "version": runtime.version(),
    }


def opened(row: str, assets: Path, results: Path, num_images: int) -> tuple[Any, Any]:
    """The float model, and the task that calibrates and judges."""
    import tersor

    if row == "ResNet-20":
        return open_resnet(assets), open_cifar(assets, max_examples=num_images)
    model = open_efficientnet(assets)
    options = {"mean": 127 / 255, "std": 128 / 255, "calibration_examples": NUM_CALIBRATION}
    task = tersor.open_task("fidelity", large_images(assets, results), options=options)
    task.prepare(model)
    return model, task


def written(model: Any, task: Any, folder: Path) -> list[str]:
    """Compress, and export both models; what the export of the int8 one says."""
    import tersor
    from tersor.exporters.check import check
    from tersor.exporters.examples import Examples
    from tersor.exporters.executorch import ExecuTorch
    from tersor.jobs.export import checkpoint_of

    images = [next(iter(batch.inputs.values())) for batch in task.batches("calibration", 16)]
    calibration = tuple({"x": x} for x in images[:8])
    examples = Examples({"x": images[0][:4]}, {"x": {0: "batch"}}, keywords=False, calibration=calibration)
    made, export, notes = tersor.compress(model, tersor.Recipe.of(**RECIPE), task).model, ExecuTorch(), ()
    for kind, each in (("fp32", model), ("int8", made)):
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, path = checkpoint_of(folder, each, examples), folder / f"{kind}.pte"
            files = export.write(checkpoint, path, Path(scratch))
            check(export, checkpoint, path, files)
            notes = files.notes
    return list(notes)


def scores(session: Any, task: Any) -> Any:
    """The scores that a task gives an exported file, image by image."""
    import torch
    from torch import nn

    class Running(nn.Module):
        """A session as a model that a task can score."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [next(iter(session.run({"x": each.numpy()}).values())) for each in x.split(32)]
            return torch.cat([torch.from_numpy(part) for part in parts])

    return task.score(Running().eval())


def times(model: Any, sessions: dict[str, Any], shape: tuple[int, ...], seconds: float) -> dict[str, dict[str, float]]:
    """CPU milliseconds per call of PyTorch and every session, in turn; how many times faster than fp32 in ExecuTorch
    (with quartiles) and than PyTorch: medians of the ratios of all rounds."""
    import numpy as np
    import torch

    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    as_tensor = torch.from_numpy(x)

    def in_torch() -> None:
        with torch.inference_mode():
            model(as_tensor)

    calls: dict[str, Any] = {"torch": in_torch}
    calls |= {name: lambda s=s: s.run({"x": x}) for name, s in sessions.items()}
    columns = in_turn(calls, seconds, least=15, most=1000, num_warm=5)
    found = {}
    for name, column in columns.items():
        ratios = columns["fp32"] / column
        low, high = np.percentile(ratios, [25, 75])
        own = {"own": float(np.median(ratios)), "low": float(low), "high": float(high)}
        found[name] = {
            "ms": 1e3 * float(np.median(column)),
            **own,
            "torch": float(np.median(columns["torch"] / column)),
        }
    return found


def line(result: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [result["row"], "{:.2f} to {:.2f}".format(*(size / 1e6 for size in result["bytes"]))]
    for batch in ("1", "32"):
        if batch not in result["latency"]:
            cells.append("-")
            continue
        fp32, int8 = (result["latency"][batch][kind] for kind in ("fp32", "int8"))
        own = f"{int8['own']:.2f}x [{int8['low']:.2f}, {int8['high']:.2f}]"
        cells.append(f"{fp32['ms']:.3f} to {int8['ms']:.3f}, {own}; {fp32['torch']:.1f}x, {int8['torch']:.1f}x")
    drop, (low, high) = result["verdict"]["drop"], result["verdict"]["drop_interval"]
    before, after = result["scores"]
    cells.append(f"{result['metric']} {before:.4f} to {after:.4f}")
    cells.append(f"{100 * drop:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    return "| " + " | ".join(cells) + " |"


def page(results: list[dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    listing = "\n".join(map(line, results))
    placed = "\n".join(f"- {result['row']}: {'; '.join(result['notes'][1:])}." for result in results)
    return f"""# CNNs with static int8 in ExecuTorch

Command: `PYTHONPATH=benchmarks python benchmarks/mobile.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, {results[0]["version"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread.

`int8/int8-static` after `fold-bn`, exported by `--to executorch` and run by XNNPACK on this machine's x86 cores: a
phone has other ones, with kernels of their own. Scores are those of the files: accuracy on the
{results[0]["num_examples"]:,} test images of CIFAR-10, and agreement with the float model on enlarged ones; the drop
from the fp32 file is in points, with its 90 % interval. Milliseconds are medians of process CPU time per call,
everything in a row timed in turn in one process: fp32 to int8 in ExecuTorch and how many times faster that is (median
of all rounds, quartiles); then how many times faster than eager PyTorch both are. The machine had other work.

| row | MB | batch 1 | batch 32 | score | points lost |
|---|---|---|---|---|---|
{listing}

Lite0's agreement is that of the artifact in PyTorch (0.7951 in static_int8.md): static int8 inputs cost it, not the
export. Its int8 file spends about half its time in depthwise convolutions (`tersor explain`).

Where the operators of the int8 files run:

{placed}
"""


if __name__ == "__main__":
    sys.exit(main())
