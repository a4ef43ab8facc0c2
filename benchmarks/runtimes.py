"""all-MiniLM-L6-v2 exported to ONNX Runtime and OpenVINO: milliseconds, megabytes and STS-B dev, against fp32.

    python benchmarks/runtimes.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

FOLDER (or TERSOR_ASSETS) holds `minilm/`, `text/stsb-dev.csv` and, to calibrate on, `text/c4-sample.txt`. Each row is
compressed, exported for both runtimes and scored in them in a process of its own, and timed in another, beside fp32 in
PyTorch and in both runtimes; both are appended to FILE (JSON lines), so that a run that was stopped goes on where it
was. `--write` puts everything in FILE into runtimes.md.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rows import Results, in_turn, run_rows
from torch import nn

import tersor
from tersor import export
from tersor.checkpoint.open import open_model
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.recipe import Recipe
from tersor.runtimes import Session, runtime_named
from tersor.tasks.data import Data
from tersor.tasks.scores import Scores

INT8, INT4 = {"embeddings.*": "int8"}, {"embeddings.*": "int4-g32"}
ROWS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {  # scheme, rules, options of the ONNX export
    "int8-static": ("int8/int8-static", INT8, {}),
    "int8-dynamic": ("int8-dynamic", INT8, {}),
    "int8-dynamic, per token": ("int8-dynamic", INT8, {"per_token": True}),
    "int8 weights": ("int8-g32", INT8, {}),
    "int4 weights": ("gptq:int4-g32", INT4, {}),
}
SHAPES = ((1, 32), (1, 128), (32, 32), (32, 128))  # texts, tokens of each
PARTS = ("scores", "times")  # of a row, each in a process of its own
NUM_FIRST = 300  # pairs that others report
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-runtimes.jsonl")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="of the exported files; default: beside FILE")
    parser.add_argument(
        "--parts", nargs="+", default=[*PARTS], choices=PARTS, help="times may wait for a quiet machine"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing at each shape, at least 8 rounds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Path(args.assets or ".")
    if not (assets / "text" / "stsb-dev.csv").exists():
        print(f"needs {assets / 'text' / 'stsb-dev.csv'}: give --assets FOLDER", file=sys.stderr)
        return 2
    work = args.work or args.results.with_suffix(".files")
    if args.run:
        row, part = args.run.split(": ")
        folder = work / row.replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(row, assets, folder) if part == "scores" else latencies(row, assets, folder, args.seconds)
        print(json.dumps(found))
        return 0
    results = Results(args.results)
    options = ["--assets", assets, "--seconds", args.seconds, "--work", work]
    complete = run_rows([f"{row}: {part}" for row in args.rows for part in args.parts], results, options)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results.joined(ROWS, PARTS)))
    return int(not complete)


class Running(nn.Module):
    """A session as a model that a task can score."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(next(iter(self.session.run(feeds).values())))


def measure(row: str, assets: Path, folder: Path) -> dict[str, Any]:
    """Compress, export and score one row; the exported files stay."""
    torch.set_num_threads(1)
    scheme, rules, options = ROWS[row]
    source = open_model(str(assets / "minilm"))
    choice = Data("similarity", assets / "text" / "stsb-dev.csv", calibration=assets / "text" / "c4-sample.txt")
    task = choice.open(source)
    original = task.score(source.model)
    result: dict[str, Any] = {"scheme": scheme, "fp32": spearman(original), "runtimes": {}}
    made = tersor.compress(source.model, Recipe.of(scheme, rules), task).model
    tersor.save(made, folder / "artifact", source=source.folder)
    for name, suffix in files_of(options).items():
        runtime = runtime_named(name)
        export(assets / "minilm", folder / f"fp32{suffix}", to=name, shape=None, overwrite=True)
        exported = export(folder / "artifact", folder / f"row{suffix}", to=name, options=options, overwrite=True)
        scores = task.score(Running(runtime.open(folder / f"row{suffix}")))
        result["runtimes"][name] = {
            "bytes": exported.num_bytes,
            "spearman": spearman(scores),
            "verdict": judge(original, scores, Tolerance.parse("0.3%")).to_dict(),
            "difference": exported.check.difference if exported.check else None,
            "notes": exported.notes,
            "version": runtime.version(),
        }
    return result | {"in_torch": spearman(task.score(made))}


def latencies(row: str, assets: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Time one row's files at every shape."""
    torch.set_num_threads(1)
    sessions: dict[str, Session] = {}
    for name, suffix in files_of(ROWS[row][2]).items():
        runtime = runtime_named(name)
        sessions[f"{name} fp32"], sessions[name] = (
            runtime.open(folder / f"{file}{suffix}") for file in ("fp32", "row")
        )
    model = open_model(str(assets / "minilm")).model
    return {"latency": {f"{b}x{n}": times(model, sessions, b, n, seconds) for b, n in SHAPES}}


def files_of(options: dict[str, Any]) -> dict[str, str]:
    """The runtimes of a row, with the suffix of their files; options are those of ONNX alone."""
    return {name: suffix for name, suffix in SUFFIXES.items() if not options or name == "onnx"}


def spearman(scores: Scores) -> tuple[float, float]:
    """Over the first pairs, and over all."""
    return Scores(scores.metric, scores.examples[:NUM_FIRST]).value, scores.value


def times(
    model: nn.Module, sessions: dict[str, Session], batch: int, length: int, seconds: float
) -> dict[str, dict[str, float]]:
    """CPU seconds per call of PyTorch and every session, in turn: medians, and the ratio to PyTorch of each round."""
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, length))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}

    def in_torch() -> None:
        with torch.inference_mode():
            model(**inputs)

    calls = {"torch": in_torch} | {name: lambda s=s: s.run(feeds) for name, s in sessions.items()}  # type: ignore[misc]
    columns = in_turn(calls, seconds, least=8, most=60, num_warm=2)
    made = {}
    for name, column in columns.items():
        ratios = columns["torch"] / column
        low, high = np.percentile(ratios, [25, 75])
        made[name] = {"ms": 1e3 * float(np.median(column)), "x": float(np.median(ratios)), "low": low, "high": high}
    return made


def lines(result: dict[str, Any]) -> list[str]:
    """A row of the table for each runtime."""
    made = []
    for name, about in result["runtimes"].items():
        verdict = about["verdict"]
        low, high = verdict["drop_interval"]
        cells = [result["row"], name, f"{about['bytes'] / 1e6:.2f}"]
        for latency in result["latency"].values():
            own, fp32 = latency[name], latency[f"{name} fp32"]
            cells.append(f"{own['ms']:.2f}, {fp32['ms'] / own['ms']:.2f}x, {own['x']:.2f}x")
        first, whole = about["spearman"]
        cells += [
            f"{first:.4f}",
            f"{whole:.4f}",
            f"{verdict['drop']:+.4f} [{low:+.4f}, {high:+.4f}] {verdict['outcome']}",
        ]
        made.append("| " + " | ".join(cells) + " |")
    return made


def baselines(results: list[dict[str, Any]]) -> list[str]:
    """fp32, a row for each runtime; the first result's process."""
    result = results[0]
    made = []
    for name in ("torch", "onnx fp32", "openvino fp32"):
        cells = [f"{each[name]['ms']:.2f}, {each[name]['x']:.2f}x" for each in result["latency"].values()]
        made.append(f"| {name.removesuffix(' fp32')} | " + " | ".join(cells) + " |")
    return made


def page(results: list[dict[str, Any]]) -> str:
    about = machine()
    versions = ", ".join(each["version"] for each in results[0]["runtimes"].values())
    shapes = " | ".join(f"{batch} x {length}" for batch, length in SHAPES)
    dashes = "|".join("---" for _ in SHAPES)
    first, whole = results[0]["fp32"]
    listing = "\n".join(line for result in results for line in lines(result))
    torch_rows = "\n".join(f"| {r['row']} | {r['in_torch'][0]:.4f} | {r['in_torch'][1]:.4f} |" for r in results)
    return f"""# all-MiniLM-L6-v2 in ONNX Runtime and OpenVINO

Command: `python benchmarks/runtimes.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, {versions},
Python {about["python"]}; {about["processor"]} ({about["cpu_capability"]}), one thread.

Milliseconds are medians of process CPU time per call, everything in a row timed in turn in one process on the same
texts x tokens; then how many times faster than the same runtime's fp32, and than fp32 in eager PyTorch. The machine had
other work: differences of less than a tenth are none. MB is the whole file, embeddings inside. Spearman on STS-B dev
over the first {NUM_FIRST} pairs and over all 1,500; the drop is over all, with its 90 % interval, judged at 0.3 %.
Calibration is on C4, 128 passages. fp32: {first:.4f} and {whole:.4f}.

| row | runtime | MB | {shapes} | Spearman, first | all | drop, verdict at 0.3 % |
|---|---|---|{dashes}|---|---|---|
{listing}

fp32 itself, in the process of the first row (ms, times faster than PyTorch):

| runtime | {shapes} |
|---|{dashes}|
{chr(10).join(baselines(results))}

The same artifacts run by tersor in PyTorch:

| row | Spearman, first | all |
|---|---|---|
{torch_rows}
"""


if __name__ == "__main__":
    sys.exit(main())
