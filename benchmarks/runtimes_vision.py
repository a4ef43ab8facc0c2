"""CNNs with static int8 exported to ONNX Runtime and OpenVINO: accuracy of the files themselves, megabytes and latency.

    python benchmarks/runtimes_vision.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

ResNet-20 and ResNet-56 on the whole CIFAR-10 test set; EfficientNet-Lite0 by its agreement with the float model on
images of CIFAR-10 enlarged to 224 x 224. Each row is compressed, exported for both runtimes and scored in them in a
process of its own, and timed in another, in turn with fp32 in the same runtime and in PyTorch; both are appended to
FILE (JSON lines), so that a run that was stopped goes on where it was. `--write` puts everything in FILE into
runtimes_vision.md. FOLDER (or TERSOR_ASSETS) holds what models.py names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rows import Results, in_turn, run_rows

RECIPE: dict[str, Any] = {"scheme": "int8/int8-static", "transforms": ["fold-bn"]}
LITE: dict[str, Any] = {"scheme": "gptq:int8/int8-static", "transforms": ["fold-bn"], "bias_correction": True}
RESNET, LARGE = (3, 32, 32), (3, 224, 224)


class Row(NamedTuple):
    """A factory of models.py, a recipe, the images it is timed on, and how it is exported."""

    factory: str
    recipe: dict[str, Any]
    shape: tuple[int, int, int]
    batches: tuple[int, int]
    float_outputs: bool = False
    peer: bool = False  # quantized by onnxruntime's own tool instead


ROWS = {
    "ResNet-20": Row("resnet20", RECIPE, RESNET, (1, 32)),
    "ResNet-20, --float-outputs": Row("resnet20", RECIPE, RESNET, (1, 32), float_outputs=True),
    "ResNet-20, quantize_static": Row("resnet20", RECIPE, RESNET, (1, 32), peer=True),
    "ResNet-56": Row("resnet56", RECIPE, RESNET, (1, 32)),
    "EfficientNet-Lite0": Row("EfficientNetLite0", LITE, LARGE, (1, 8)),
}
PARTS = ("scores", "times")  # of a row, each in a process of its own
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-runtimes-vision.jsonl")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="of the exported files; default: beside FILE")
    parser.add_argument(
        "--parts", nargs="+", default=[*PARTS], choices=PARTS, help="times may wait for a quiet machine"
    )
    parser.add_argument("--images", type=int, default=10_000, help="of the test set that are judged")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing at each batch size, at least 15 rounds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work or args.results.with_suffix(".files")
    if args.run:
        row, part = args.run.split(": ")
        folder = work / row.replace(" ", "").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        if part == "scores":
            print(json.dumps(measure(row, args.assets, folder, args.images)))
        else:
            print(json.dumps(latencies(row, args.assets, folder, args.seconds)))
        return 0
    results = Results(args.results)
    options = ["--assets", args.assets, "--images", args.images, "--seconds", args.seconds, "--work", work]
    complete = run_rows([f"{row}: {part}" for row in args.rows for part in args.parts], results, options)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results.joined(ROWS, PARTS)))
    return int(not complete)


def opened(row: str, assets: Path, folder: Path, num_images: int) -> tuple[Any, Any, Any]:
    """The float model, the task that judges and calibrates, and what the exporter takes calibration images from."""
    from models import MEAN, STD, open_cifar, open_efficientnet, open_resnet
    from static_int8 import NUM_CALIBRATION, large_images

    import tersor
    from tersor.tasks.data import Data

    if ROWS[row].shape == LARGE:
        options = {"mean": 127 / 255, "std": 128 / 255, "calibration_examples": NUM_CALIBRATION}
        file = large_images(assets, folder)
        choice = Data("fidelity", file, options=options)
        return open_efficientnet(assets), tersor.open_task("fidelity", file, options=options), choice
    images = {"mean": list(MEAN), "std": list(STD), "max_examples": 64}
    model = open_resnet(assets, int(ROWS[row].factory.removeprefix("resnet")))
    choice = Data("classification", assets / "cifar10.npz", options=images)
    return model, open_cifar(assets, max_examples=num_images), choice


def measure(row: str, assets: Path, folder: Path, num_images: int) -> dict[str, Any]:
    """Compress, export and score one row; the exported files stay."""
    import torch

    import tersor
    from tersor import export
    from tersor.measure.verdict import Tolerance, judge
    from tersor.runtimes import runtime_named

    torch.set_num_threads(1)
    model, task, choice = opened(row, assets, folder, num_images)
    task.prepare(model)
    result: dict[str, Any] = {"runtimes": {}}
    if ROWS[row].peer:
        return peer(row, folder, model, task, choice)
    made = tersor.compress(model, tersor.Recipe.of(**ROWS[row].recipe), task).model
    tersor.save(made, folder / "artifact")
    tersor.save(model, folder / "float")
    factory, options = f"models:{ROWS[row].factory}", {"float_outputs": ROWS[row].float_outputs}
    for to, suffix in SUFFIXES.items():
        fp32, output, artifact = folder / f"fp32{suffix}", folder / f"int8{suffix}", folder / "artifact"
        export(factory, fp32, to=to, weights=folder / "float", data=choice, overwrite=True)
        exported = export(factory, output, to=to, weights=artifact, data=choice, options=options, overwrite=True)
        before, after = (scores(runtime_named(to).open(file), task) for file in (fp32, output))
        result["num_images"] = len(after.examples)
        result["runtimes"][to] = {
            "bytes": exported.num_bytes,
            "fp32_bytes": sum(file.stat().st_size for file in folder.glob("fp32.*") if of(file, to)),
            "metric": after.metric.name,
            "fp32": before.value,
            "accuracy": after.value,
            "verdict": judge(before, after, Tolerance.parse("0.2%")).to_dict(),
            "difference": exported.check.difference if exported.check else None,
            "notes": exported.notes,
            "version": runtime_named(to).version(),
        }
    return result


def peer(row: str, folder: Path, model: Any, task: Any, choice: Any) -> dict[str, Any]:
    """As `measure`, with onnxruntime's own quantizer."""
    import openvino
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    import tersor
    from tersor import export
    from tersor.measure.verdict import Tolerance, judge
    from tersor.runtimes import runtime_named

    tersor.save(model, folder / "float")
    factory = f"models:{ROWS[row].factory}"
    for to, suffix in SUFFIXES.items():
        export(factory, folder / f"fp32{suffix}", to=to, weights=folder / "float", data=choice, overwrite=True)
    name = runtime_named("onnx").open(folder / "fp32.onnx").inputs[0].name

    class Reader(CalibrationDataReader):
        feeds = iter([{name: batch.inputs["x"].numpy()} for batch in task.batches("calibration")])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    quantize_static(
        folder / "fp32.onnx",
        folder / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    openvino.save_model(openvino.convert_model(folder / "int8.onnx"), folder / "int8.xml", compress_to_fp16=False)
    result: dict[str, Any] = {"runtimes": {}}
    for to, suffix in SUFFIXES.items():
        before, after = (scores(runtime_named(to).open(folder / f"{file}{suffix}"), task) for file in ("fp32", "int8"))
        result["num_images"] = len(after.examples)
        result["runtimes"][to] = {
            "bytes": sum(file.stat().st_size for file in folder.glob("int8.*") if of(file, to)),
            "fp32_bytes": sum(file.stat().st_size for file in folder.glob("fp32.*") if of(file, to)),
            "fp32": before.value,
            "accuracy": after.value,
            "verdict": judge(before, after, Tolerance.parse("0.2%")).to_dict(),
            "version": runtime_named(to).version(),
        }
    return result


def latencies(row: str, assets: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Time one row's files."""
    import torch

    from tersor.runtimes import runtime_named

    torch.set_num_threads(1)
    sessions: dict[str, Any] = {}
    for to, suffix in SUFFIXES.items():
        files = (folder / f"{name}{suffix}" for name in ("fp32", "int8"))
        sessions[f"{to} fp32"], sessions[to] = (runtime_named(to).open(file) for file in files)
    model, shape = opened(row, assets, folder, 1)[0], ROWS[row].shape
    return {"latency": {str(batch): times(model, sessions, (batch, *shape), seconds) for batch in ROWS[row].batches}}


def of(file: Path, to: str) -> bool:
    """Whether a file belongs to what was exported for a runtime."""
    return (file.suffix == ".onnx") == (to == "onnx")


def scores(session: Any, task: Any) -> Any:
    """The scores that a task gives an exported file, image by image."""
    import torch
    from torch import nn

    class Running(nn.Module):
        """A session as a model that a task can score."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(next(iter(session.run({session.inputs[0].name: x.numpy()}).values())))

    return task.score(Running().eval())


def times(model: Any, sessions: dict[str, Any], shape: tuple[int, ...], seconds: float) -> dict[str, dict[str, float]]:
    """CPU milliseconds per call of PyTorch and every session, in turn; how many times faster than PyTorch and than the
    same runtime's fp32: medians of the ratios of all rounds, with their quartiles."""
    import numpy as np
    import torch

    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    as_tensor = torch.from_numpy(x)

    def in_torch() -> None:
        with torch.inference_mode():
            model(as_tensor)

    calls: dict[str, Any] = {"torch": in_torch}
    calls |= {name: lambda s=s: s.run({s.inputs[0].name: x}) for name, s in sessions.items()}
    columns = in_turn(calls, seconds, least=15, most=400, num_warm=5)
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
    counts = ", ".join(f"{result['row']}: {result['num_images']:,}" for result in results)
    return f"""# CNNs with static int8 in ONNX Runtime and OpenVINO

Command: `PYTHONPATH=benchmarks python benchmarks/runtimes_vision.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, {versions}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread.

`int8/int8-static` after `fold-bn`, calibrated on 128 training images of CIFAR-10 and exported by `tersor export`;
EfficientNet-Lite0 with weights by `gptq` and bias correction, calibrated on 32 images. Accuracy is that of the
exported files, run by their runtimes on test images ({counts}); the drop
from fp32 in the same runtime is in points, with its 90 % interval. For EfficientNet-Lite0 it is agreement with the
float model: there are no ImageNet images here, so they are enlarged ones of CIFAR-10, unlike those it was trained on.
`quantize_static` is the plain way: onnxruntime's own quantizer (QDQ, unsigned inputs, a scale per channel, its default
range from 128 images) on the fp32 file, read by both runtimes.
Milliseconds are medians of process CPU time per call at batch 1 and 32 (EfficientNet-Lite0: 8), everything in a row
timed in turn in one process: fp32 to int8 in the same runtime, how many times faster that is (median of all rounds,
quartiles), and how many times faster than fp32 in eager PyTorch. The machine had other work: differences of less than a
tenth are none, and where quartiles are wide, little is certain.

| row | runtime | MB | batch 1 | batch 32 or 8 | accuracy | points lost |
|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
