"""int8 files on several processors: the same answer on each, and what that costs.

    python benchmarks/processors.py --assets FOLDER --work FOLDER2 [--steps STEP ...] [--write]

Steps: `make` writes the files, for any processor and for those with VNNI instructions alone, into FOLDER2; `here`,
`haswell` and `arm64` run them on this machine and as the other processors (tests/cpus/emulate.py); `noise` compares the
rounding that no kernel overflows with full 8 bits and with 7. `--write` puts what has been measured into
benchmarks/processors.md.

A multilayer perceptron, a net with depthwise convolutions and an LSTM learn MNIST for one epoch; ResNet-20 and
all-MiniLM-L6-v2 come as they are. FOLDER (or TERSOR_ASSETS) holds what models.py names, and `minilm/`,
`text/stsb-dev.csv` and `text/c4-sample.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CPUS = ("any", "vnni")
STEPS = ("make", "here", "haswell", "arm64", "noise")
NUM_DIGITS, NUM_PICTURES, NUM_PAIRS = 1000, 200, 12  # judged on every processor
NUM_CALIBRATION, CHUNK = 256, 50
NOISY = ("ResNet-20", "ResNet-56", "EfficientNet-Lite0", "MiniLM")
METHODS = ("nearest", "gptq")
NUM_NOISY = 1000  # pictures of CIFAR-10 that the ResNets are judged on there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tersor-processors")
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS, metavar="STEP", help="default: all")
    parser.add_argument("--models", nargs="*", default=None, metavar="MODEL", help="default: all")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.judge:
        judge(args.work, args.models)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for step in args.steps:
        if step == "make":
            for name in args.models or FILES:
                make(name, args.assets, args.work)
        elif step == "noise":
            for name in args.models or NOISY:
                keep(args.work, f"noise {name}", noise(name, args.assets, args.work))
        else:
            for name in args.models or FILES:
                found = read(args.work, step) | judged_on(step, args.work, name)
                keep(args.work, step, found)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(args.work))


def read(work: Path, name: str) -> Any:
    """The results saved under a name; empty where they were not measured."""
    file = work / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def keep(work: Path, name: str, result: Any) -> None:
    (work / f"{name}.json").write_text(json.dumps(result, indent=1))


# The files.


def make(name: str, assets: Path, work: Path) -> None:
    """Compress a model for both kinds of processors, and write it for every runtime, with inputs and answers."""
    import torch

    import tersor
    from tersor.exporters.examples import Examples
    from tersor.exporters.onnx import Onnx
    from tersor.exporters.openvino import OpenVinoIr
    from tersor.jobs.export import checkpoint_of
    from tersor.tasks.inputs import scoring

    torch.manual_seed(0)
    model, recipe, inputs, calibration, about = FILES[name](assets)
    axes = {key: {0: "batch", 1: "sequence"} if key.endswith(("ids", "mask")) else {0: "batch"} for key in inputs}
    examples = Examples({k: v[:4] for k, v in inputs.items()}, axes, name == "MiniLM", calibration=(calibration,))
    for cpu in CPUS:
        made = tersor.compress(model, tersor.Recipe.of(**recipe).for_cpu(cpu), Inputs(calibration)).model
        with scoring(made):
            answers = [run(made, {k: v[i : i + CHUNK] for k, v in inputs.items()}) for i in chunks(inputs)]
        stem = work / f"{name} {cpu}"
        arrays = {f"in:{k}": v.numpy() for k, v in inputs.items()} | {f"about:{k}": v for k, v in about.items()}
        np.savez(f"{stem}.npz", expected=np.concatenate(answers), **arrays)
        for export in (Onnx(cpu=cpu), OpenVinoIr(cpu=cpu)):
            with tempfile.TemporaryDirectory() as scratch:
                export.write(checkpoint_of(work, made, examples), Path(f"{stem}{export.suffix}"), Path(scratch))
        print(stem.name, "written", flush=True)


def chunks(inputs: dict[str, Any]) -> range:
    return range(0, len(next(iter(inputs.values()))), CHUNK)


def run(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    output = model(**inputs) if len(inputs) > 1 else model(*inputs.values())
    return (output.last_hidden_state if hasattr(output, "last_hidden_state") else output).float().numpy()


class Inputs:
    """A batch as a task to calibrate on."""

    name, output, description, fingerprint = "inputs", "values", "", ""

    def __init__(self, inputs: dict[str, Any]):
        self.inputs = inputs

    def prepare(self, original: Any) -> None:
        pass

    def batches(self, split: str, batch_size: int | None = None) -> Any:
        size = batch_size or 64
        for i in range(0, len(next(iter(self.inputs.values()))), size):
            yield {k: v[i : i + size] for k, v in self.inputs.items()}

    def forward(self, model: Any, batch: dict[str, Any]) -> Any:
        output = model(**batch) if len(batch) > 1 else model(*batch.values())
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output

    def score(self, model: Any, split: str = "eval") -> Any:
        raise NotImplementedError


STATIC = {"scheme": "int8/int8-static", "transforms": ["fold-bn"]}


def perceptron(assets: Path) -> Any:
    from models import LeNet300100

    return learned(LeNet300100, assets, {"scheme": "int8/int8-static"})


def depthwise(assets: Path) -> Any:
    from torch import nn

    def block(num_in: int, num_out: int, stride: int, groups: int, size: int) -> list[nn.Module]:
        conv = nn.Conv2d(num_in, num_out, size, stride, size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(num_out), nn.ReLU6()]

    def build() -> nn.Module:
        layers = [*block(1, 15, 2, 1, 3), *block(15, 15, 1, 15, 3), *block(15, 35, 1, 1, 1)]
        layers += [*block(35, 35, 2, 35, 3), *block(35, 64, 1, 1, 1), *block(64, 64, 1, 2, 3)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    return learned(build, assets, STATIC)


def recurrent(assets: Path) -> Any:
    import torch
    from torch import nn

    class Rows(nn.Module):
        """Reads a digit row by row."""

        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(28, 96, batch_first=True), nn.Linear(96, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x.squeeze(1))[0][:, -1])

    return learned(Rows, assets, {"scheme": "int8/int8-dynamic", "rules": {"lstm*": "int8"}})


def learned(build: Any, assets: Path, recipe: dict[str, Any]) -> Any:
    """A net after one epoch of MNIST."""
    import torch
    from models import existing

    data = np.load(existing(assets / "vision" / "mnist.npz"))
    x, x_test = (torch.from_numpy(data[k]).float().div(255).view(-1, 1, 28, 28) for k in ("x_train", "x_test"))
    y, model = torch.from_numpy(data["y_train"]).long(), build()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for rows in torch.randperm(len(x)).split(128):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    judged = x_test[:NUM_DIGITS]
    return model.eval(), recipe, {"x": judged}, {"x": x[:NUM_CALIBRATION]}, {"label": data["y_test"][:NUM_DIGITS]}


def resnet(assets: Path) -> Any:
    import torch
    from models import MEAN, STD, existing, open_resnet

    data = np.load(existing(assets / "cifar10.npz"))

    def pictures(key: str, num: int) -> torch.Tensor:
        x = torch.from_numpy(data[key][:num]).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    about = {"label": data["y_test"][:NUM_PICTURES]}
    judged, calibration = pictures("x_test", NUM_PICTURES), pictures("x_train", NUM_CALIBRATION)
    return open_resnet(assets), STATIC, {"x": judged}, {"x": calibration}, about


def minilm(assets: Path) -> Any:
    import csv

    from transformers import AutoModel, AutoTokenizer

    rows = list(csv.reader((assets / "text" / "stsb-dev.csv").open()))[:NUM_PAIRS]
    passages = (assets / "text" / "c4-sample.txt").read_text().split("\n")
    texts = [text for row in rows for text in row[:2]], [text for text in passages if len(text) > 100][:64]
    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm")
    judged, calibration = (
        dict(tokenizer(t, padding="max_length", truncation=True, max_length=48, return_tensors="pt")) for t in texts
    )
    recipe = {"scheme": "int8/int8-dynamic", "rules": {"*embeddings*": "int8"}, "exclude": ["*pooler*"]}
    about = {"score": np.array([float(row[2]) for row in rows])}
    return AutoModel.from_pretrained(assets / "minilm").eval(), recipe, judged, calibration, about


FILES = {
    "MLP": perceptron,
    "depthwise CNN": depthwise,
    "LSTM": recurrent,
    "ResNet-20": resnet,
    "MiniLM": minilm,
}


# What they compute; nothing but NumPy and the runtime is imported here, for emulated processors.


def judged_on(processor: str, work: Path, name: str) -> Any:
    """The results of `judge` for a model on a processor."""
    sys.path.insert(0, str(ROOT / "tests" / "cpus"))
    from emulate import command, environment

    arguments = [str(Path(__file__).resolve()), "--judge", "--models", name, "--work", str(work.resolve())]
    if processor == "here":
        line, variables = [sys.executable, *arguments], dict(os.environ)
    else:
        line, variables = command(processor, arguments), environment(processor)
    done = subprocess.run(line, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def judge(work: Path, names: list[str]) -> None:
    """Prints, as JSON, the largest difference of every file from the model, relative to its largest output, and its
    score."""
    found = {}
    for data in (work / f"{name} {cpu}.npz" for name in names for cpu in CPUS):
        arrays = np.load(data)
        inputs = {k.removeprefix("in:"): arrays[k] for k in arrays.files if k.startswith("in:")}
        for suffix, opened in (("onnx", open_onnx), ("xml", open_openvino)):
            file = data.with_name(f"{data.stem}.{suffix}")
            call = opened(file)
            parts = [call({k: v[i : i + CHUNK] for k, v in inputs.items()}) for i in chunks(inputs)]
            made, expected = np.concatenate(parts), arrays["expected"]
            difference = float(np.abs(made - expected).max() / np.abs(expected).max())
            found[file.name] = {
                "largest": difference,
                "relative": float(np.linalg.norm(made - expected) / np.linalg.norm(expected)),
                "score": scored(made, arrays),
                "model": scored(expected, arrays),
            }
            print(file.name, found[file.name], file=sys.stderr, flush=True)
    print(json.dumps(found))


def open_onnx(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def open_openvino(file: Path) -> Any:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda feeds: next(iter(model(feeds).values()))


def scored(outputs: np.ndarray, arrays: Any) -> float:
    """Accuracy, or the Spearman correlation of cosines with human scores."""
    if "about:label" in arrays.files:
        return float((outputs.argmax(-1) == arrays["about:label"]).mean())
    mask = arrays["in:attention_mask"][..., None]
    pooled = (outputs * mask).sum(1) / mask.sum(1)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    cosine = (pooled[::2] * pooled[1::2]).sum(1)
    return float(np.corrcoef(ranks(cosine), ranks(arrays["about:score"]))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, those of equal values averaged."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


# What the rounding costs.


def noise(name: str, assets: Path, work: Path) -> Any:
    """Squared errors of all layers' outputs, relative to full 8 bits by the same method, and the model's score."""
    import models
    import static_int8

    row = {"ResNet-20": "ResNet-20 cubed-error", "ResNet-56": "ResNet-56 cubed-error"}.get(name)
    row = row or {"EfficientNet-Lite0": "Lite0 cubed-error", "MiniLM": "MiniLM cubed-error"}[name]
    model, task, data, _ = static_int8.opened(row, assets, work / "noise.jsonl")
    if name.startswith("ResNet"):
        task = data = models.open_cifar(assets, max_examples=NUM_NOISY)
    for each in (task, data):
        each.prepare(model)
    fields = {key: value for key, value in static_int8.ROWS[row].items() if key != "scheme"}
    found: dict[str, Any] = {"float": task.score(model).value}
    for method in METHODS:
        errors = {bits: layer_errors(model, data, method, fields, bits) for bits in ("full", "safe", "7 bits")}
        full = errors["full"][1]
        for bits, (score, layers) in errors.items():
            ratios = [layers[site] / full[site] for site in full if full[site] > 0]
            sums = sum(layers.values()) / sum(full.values())
            scored = task.score(score).value
            found[f"{method} {bits}"] = {"mean": float(np.mean(ratios)), "sum": float(sums), "score": scored}
            print(name, method, bits, found[f"{method} {bits}"], flush=True)
    return found


def layer_errors(model: Any, data: Any, method: str, fields: dict[str, Any], bits: str) -> Any:
    """The compressed model, and the squared error of every layer's output that its new weight makes."""
    from unittest.mock import patch

    import tersor
    from tersor.steps import step_visitor, weights_run

    layers: dict[str, float] = {}
    compress_site = step_visitor.compress_site

    def watched(site: Any, weight: Any, scheme: Any, stats: Any) -> Any:
        encoded = compress_site(site, weight, scheme, stats)
        if stats.second_moment is not None and scheme.activation:
            error = encoded.decode() - weight
            layers[site.name] = ((error @ stats.second_moment) * error).sum().item()
        return encoded

    spelled = "gptq(upstream_correction=0.0)" if method == "gptq" else method
    recipe = tersor.Recipe.of(f"{spelled}:int8/int8-static", **fields).for_cpu("vnni" if bits == "full" else "any")
    seven = patch.object(step_visitor, "without_overflow", lambda format, neighbours: seven_bits())
    needed = patch.object(weights_run, "needs_of", with_moments(weights_run.needs_of))
    with patch.object(step_visitor, "compress_site", watched), needed:
        if bits == "7 bits":
            with seven:
                return tersor.compress(model, recipe, data).model, layers
        return tersor.compress(model, recipe, data).model, layers


def with_moments(needs_of: Any) -> Any:
    return lambda model, schemes: needs_of(model, schemes) | {"second_moment"}


def seven_bits() -> Any:
    """int8 with codes up to 63: what others write where products may overflow."""
    import torch

    from tersor.formats.int_group import IntGroup

    class SevenBits(IntGroup):
        def fit(self, weight: Any, shrink: Any = 1.0) -> Any:
            return super().fit(weight, shrink * 127 / 63)

        def quantize(self, weight: Any, params: Any) -> Any:
            return super().quantize(weight, params).clamp(128 - 63, 128 + 63)

        def projector(self, params: Any, shape: Any) -> Any:
            project, most = super().projector(params, shape), 63 * params["scale"].float()[:, 0]
            return lambda values, j: project(torch.minimum(torch.maximum(values, -most), most), j)

    return SevenBits(8)


# The page.


def page(work: Path) -> str:
    return PAGE.format(files=table_of_files(work), noise=table_of_noise(work))


def table_of_files(work: Path) -> str:
    here, haswell, arm = (read(work, step) for step in ("here", "haswell", "arm64"))
    lines = []
    for name in FILES:
        for suffix, runtime in (("onnx", "ONNX Runtime"), ("xml", "OpenVINO")):
            for cpu in reversed(CPUS):
                file = f"{name} {cpu}.{suffix}"
                if file in here:
                    cells = " | ".join(cell(found.get(file)) for found in (here, haswell, arm))
                    lines.append(f"| {name} | {runtime} | `{cpu}` | {here[file]['model']:.4f} | {cells} |")
    return "\n".join(lines)


def cell(result: Any) -> str:
    return f"{result['largest']:.2%} | {result['score']:.4f}" if result else "- | -"


def table_of_noise(work: Path) -> str:
    lines = []
    for name in NOISY:
        found = read(work, f"noise {name}")
        for method in METHODS if found else ():
            cells = [f"{found['float']:.4f}", f"{found[f'{method} full']['score']:.4f}"]
            for bits in ("safe", "7 bits"):
                each = found[f"{method} {bits}"]
                cells.append(f"{each['mean']:.2f} | {each['sum']:.2f} | {each['score']:.4f}")
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAGE = f"""# int8 on every processor

Command: `python benchmarks/processors.py --assets FOLDER --write`

Files in int8, written by `--cpu vnni`, which leaves weights free, and by `--cpu any`, the default, which lets no pair
of products overflow 16 bits. "Here" is a processor with AVX-512 and VNNI instructions; Haswell (AVX2) and ARM64 (a
Neoverse N1) are emulated. For each: the largest difference from the model in PyTorch, relative to its largest output,
and the score: accuracy on {NUM_DIGITS} digits of MNIST (MLP, depthwise CNN, LSTM) and {NUM_PICTURES} pictures of
CIFAR-10 (ResNet-20), Spearman correlation on {NUM_PAIRS} pairs of STS-B dev (MiniLM). What differs here, too, is what a
runtime rounds in its own way: outputs between convolutions, one scale for all tokens. What has a dash, or
no row, was not measured.

| model | runtime | `--cpu` | in PyTorch | here | score | Haswell | score | ARM64 | score |
|---|---|---|---|---|---|---|---|---|---|
{{files}}

## What it costs

Squared errors of the layers' outputs on calibration data, relative to full 8 bits by the same method: the mean over the
layers, and the sum. Inputs are int8-static. Scores: accuracy on {NUM_NOISY:,} pictures of CIFAR-10, agreement with the
float model on 288 pictures (EfficientNet-Lite0), Spearman correlation on STS-B dev (MiniLM).
7 bits is what others write where products may overflow (`reduce_range`).

| model | method | float | full 8 bits | no overflow: mean | sum | score | 7 bits: mean | sum | score |
|---|---|---|---|---|---|---|---|---|---|
{{noise}}
"""

if __name__ == "__main__":
    main()
