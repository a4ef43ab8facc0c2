"""CNNs with static int8 exported to ONNX Runtime and OpenVINO: accuracy of the files themselves, megabytes and latency.

    python benchmarks/runtimes_vision.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

ResNet-20 and ResNet-56 on the whole CIFAR-10 test set. Each row is compressed, exported for both runtimes, scored in
them and timed in a process of its own, in turn with fp32 in the same runtime and in PyTorch; it is appended to FILE
(JSON lines), so that a run that was stopped goes on where it was. `--write` puts everything in FILE into
runtimes_vision.md. FOLDER (or TERSOR_ASSETS) holds what models.py names.
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

from models import MEAN, STD, open_cifar, open_resnet
from rows import Results, run_rows

RECIPE: dict[str, Any] = {"scheme": "int8/int8-static", "transforms": ["fold-bn"]}
ROWS: dict[str, tuple[int, bool]] = {  # depth, float outputs
    "ResNet-20": (20, False),
    "ResNet-20, --float-outputs": (20, True),
    "ResNet-56": (56, False),
}
BATCHES = (1, 32)
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-runtimes-vision.jsonl")
    parser.add_argument("--pictures", type=int, default=10_000, help="of the test set that are judged")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing at each batch size, at least 15 rounds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run, args.assets, args.pictures, args.seconds)))
        return 0
    results = Results(args.results)
    options = ["--assets", args.assets, "--pictures", args.pictures, "--seconds", args.seconds]
    complete = run_rows(args.rows, results, options, show=lambda result: "\n".join(lines(result)))
    if args.write and results:
        Path(__file__).with_suffix(".md").write_text(page(results.among(ROWS)))
    return int(not complete)


def measure(row: str, assets: Path, num_pictures: int, seconds: float) -> dict[str, Any]:
    """Compress, export, score and time one row."""
    import torch

    import tersor
    from tersor.export.artifact import export_model
    from tersor.measure.verdict import Tolerance, judge
    from tersor.runtimes import runtime_named
    from tersor.workflow import TaskChoice

    torch.set_num_threads(1)
    depth, float_outputs = ROWS[row]
    task, model = open_cifar(assets, max_examples=num_pictures), open_resnet(assets, depth)
    pictures = {"mean": list(MEAN), "std": list(STD), "max_examples": 64}
    choice = TaskChoice("classification", assets / "cifar10.npz", options=pictures)
    sessions: dict[str, Any] = {}
    result: dict[str, Any] = {"row": row, "runtimes": {}, "num_pictures": num_pictures}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = tersor.compress(model, tersor.Recipe.of(**RECIPE), task).model
        tersor.save(made, folder / "artifact")
        tersor.save(model, folder / "float")
        factory = f"models:resnet{depth}"
        for to, suffix in SUFFIXES.items():
            runtime = runtime_named(to)
            fp32, output = folder / f"fp32{suffix}", folder / f"int8{suffix}"
            export_model(factory, fp32, to=to, weights=folder / "float", task_choice=choice)
            exported = export_model(
                *(factory, output),
                to=to,
                weights=folder / "artifact",
                task_choice=choice,
                options={"float_outputs": float_outputs},
            )
            sessions[f"{to} fp32"], sessions[to] = runtime.open(fp32), runtime.open(output)
            before, after = (scores(sessions[each], task) for each in (f"{to} fp32", to))
            result["runtimes"][to] = {
                "bytes": exported.num_bytes,
                "fp32_bytes": sum(file.stat().st_size for file in folder.glob("fp32.*") if of(file, to)),
                "fp32": before.value,
                "accuracy": after.value,
                "verdict": judge(before, after, Tolerance.parse("0.2%")).to_dict(),
                "difference": exported.check.difference if exported.check else None,
                "notes": exported.notes,
                "version": runtime.version(),
            }
        result["latency"] = {str(batch): times(model, sessions, batch, seconds) for batch in BATCHES}
    return result


def of(file: Path, to: str) -> bool:
    """Whether a file belongs to what was exported for a runtime."""
    return (file.suffix == ".onnx") == (to == "onnx")


def scores(session: Any, task: Any) -> Any:
    """What the file itself gets right, picture by picture."""
    import torch
    from torch import nn

    class Running(nn.Module):
        """A session as a model that a task can score."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(next(iter(session.run({session.inputs[0].name: x.numpy()}).values())))

    return task.score(Running().eval())


def times(model: Any, sessions: dict[str, Any], batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """CPU milliseconds per call of PyTorch and every session, in turn; how many times faster than PyTorch and than the
    same runtime's fp32: medians of the ratios of all rounds, with their quartiles."""
    import numpy as np
    import torch

    x = np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)
    as_tensor = torch.from_numpy(x)

    def in_torch() -> None:
        with torch.inference_mode():
            model(as_tensor)

    calls: dict[str, Any] = {"torch": in_torch}
    calls |= {name: lambda s=s: s.run({s.inputs[0].name: x}) for name, s in sessions.items()}
    for call in [*calls.values()] * 5:
        call()
    rounds: list[list[float]] = []
    started, generator = time.perf_counter(), np.random.default_rng(0)
    while len(rounds) < 400 and (len(rounds) < 15 or time.perf_counter() - started < seconds):
        spent = dict.fromkeys(calls, 0.0)
        for name in generator.permutation(list(calls)):
            before = time.process_time()
            calls[name]()
            spent[name] = time.process_time() - before
        rounds.append(list(spent.values()))
    columns = dict(zip(calls, np.array(rounds).T, strict=True))
    found = {}
    for name, column in columns.items():
        ratios = columns["torch" if name == "torch" else f"{name.split()[0]} fp32"] / column
        low, high = np.percentile(ratios, [25, 75])
        found[name] = {
            "ms": 1e3 * float(np.median(column)),
            "own": float(np.median(ratios)),
            "low": float(low),
            "high": float(high),
            "torch": float(np.median(columns["torch"] / column)),
        }
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """A row of the table for each runtime."""
    made = []
    for name, about in result["runtimes"].items():
        low, high = about["verdict"]["drop_interval"]
        cells = [result["row"], name, f"{about['fp32_bytes'] / 1e6:.2f} to {about['bytes'] / 1e6:.2f}"]
        for latency in result["latency"].values():
            each, fp32 = latency[name], latency[f"{name} fp32"]
            own = f"{each['own']:.2f}x [{each['low']:.2f}, {each['high']:.2f}]"
            cells.append(f"{fp32['ms']:.2f} to {each['ms']:.2f}, {own}, {each['torch']:.1f}x")
        cells += [f"{about['fp32']:.4f} to {about['accuracy']:.4f}", f"{100 * about['verdict']['drop']:+.2f}"]
        cells[-1] += f" [{100 * low:+.2f}, {100 * high:+.2f}]"
        made.append("| " + " | ".join(cells) + " |")
    return made


def page(results: list[dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    versions = ", ".join(each["version"] for each in results[0]["runtimes"].values())
    listing = "\n".join(line for result in results for line in lines(result))
    return f"""# CNNs with static int8 in ONNX Runtime and OpenVINO

Command: `PYTHONPATH=benchmarks python benchmarks/runtimes_vision.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, {versions}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread.

`int8/int8-static` after `fold-bn`, calibrated on 128 training pictures of CIFAR-10 and exported by `tersor export`.
Accuracy is that of the exported files, run by their runtimes on {results[0]["num_pictures"]:,} test pictures; the drop
from fp32 in the same runtime is in points, with its 90 % interval. Milliseconds are medians of process CPU time per
call at batch 1 and 32, everything in a row timed in turn in one process: fp32 to int8 in the same runtime, how many
times faster that is (median of all rounds, quartiles), and how many times faster than fp32 in eager PyTorch. The
machine had other work: differences of less than a tenth are none, and at batch 1 the wide
quartiles say that little is certain.

| row | runtime | MB | batch 1 | batch 32 | accuracy | points lost |
|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
