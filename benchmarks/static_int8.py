"""Static int8 inputs in the model itself: every observer, equalization, bias correction, sensitive sites kept.

    python benchmarks/static_int8.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

ResNet-20 and ResNet-56 on the whole CIFAR-10 test set; ResNet-20 with 4-bit inputs, where observers differ, on 1,000 of
its images; EfficientNet-Lite0, whose depthwise convolutions are the hard case, by its agreement with the float model;
all-MiniLM-L6-v2 on STS-B dev.

Each row runs in a process of its own and is appended to FILE (JSON lines), so that a run that was stopped goes on where
it was; `--write` puts everything in FILE into benchmarks/static_int8.md. FOLDER (or TERSOR_ASSETS) holds what models.py
names, and `minilm/`, `text/stsb-dev.csv` and `text/c4-sample.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from protocol import Meter
from rows import Results, run_rows

OBSERVERS = ("cubed-error", "mse", "min-max", "moving-average", "percentile", "entropy")
ENDS = {"conv1": "int8/int8-static", "linear": "int8/int8-static"}  # first and last layer of the ResNets
FOLD = {"transforms": ["fold-bn"]}
EQUAL = {"transforms": ["fold-bn", "equalize"]}
NUM_IMAGES = 1000  # judged with 4-bit inputs
NUM_PASSAGES = 128  # that calibrate all-MiniLM-L6-v2
NUM_AGREEING, NUM_CALIBRATION, SIDE = 288, 32, 224  # of EfficientNet-Lite0

EIGHT: dict[str, dict[str, Any]] = {
    "ResNet-20 float": {},
    **{f"ResNet-20 {name}": {"scheme": f"int8/{name}:int8-static", **FOLD} for name in OBSERVERS},
    "ResNet-20 cubed-error, batch norms not folded": {"scheme": "int8/int8-static"},
    "ResNet-20 cubed-error, bias correction": {"scheme": "int8/int8-static", "bias_correction": True, **FOLD},
    "ResNet-20 cubed-error, equalize": {"scheme": "int8/int8-static", **EQUAL},
    "ResNet-20 cubed-error, equalize, bias correction": {
        **{"scheme": "int8/int8-static", "bias_correction": True},
        **EQUAL,
    },
    "ResNet-56 float": {},
    "ResNet-56 cubed-error": {"scheme": "int8/int8-static", **FOLD},
}
FOUR: dict[str, dict[str, Any]] = {
    "4 bits float": {},
    **{f"4 bits {name}": {"scheme": f"int8/{name}:int4-static", "rules": ENDS, **FOLD} for name in OBSERVERS},
    "4 bits mse, keep-float auto": {"scheme": "int8/mse:int4-static", "rules": ENDS, "keep_float": "auto", **FOLD},
    "4 bits mse, keep-float 3": {"scheme": "int8/mse:int4-static", "rules": ENDS, "keep_float": 3, **FOLD},
}
LITE: dict[str, dict[str, Any]] = {
    **{f"Lite0 {name}": {"scheme": f"int8/{name}:int8-static", **FOLD} for name in OBSERVERS},
    "Lite0 cubed-error, batch norms not folded": {"scheme": "int8/int8-static"},
    "Lite0 cubed-error, bias correction": {"scheme": "int8/int8-static", "bias_correction": True, **FOLD},
    "Lite0 int8 weights, float inputs": {"scheme": "int8", **FOLD},
    "Lite0 cubed-error, gptq, bias correction": {"scheme": "gptq:int8/int8-static", "bias_correction": True, **FOLD},
    "Lite0 cubed-error, keep-float auto": {"scheme": "int8/int8-static", "keep_float": "auto", **FOLD},
}
BERT = {"rules": {"*embeddings*": "int8"}, "exclude": ["*pooler*"]}  # the pooler takes no part
MINILM: dict[str, dict[str, Any]] = {
    "MiniLM float": {},
    "MiniLM int8-dynamic": {"scheme": "int8/int8-dynamic", **BERT},
    **{f"MiniLM {name}": {"scheme": f"int8/{name}:int8-static", **BERT} for name in OBSERVERS},
    "MiniLM cubed-error, smooth": {"scheme": "int8/int8-static", "transforms": ["smooth"], **BERT},
    "MiniLM cubed-error, keep-float auto": {"scheme": "int8/int8-static", "keep_float": "auto", **BERT},
    "MiniLM min-max, keep-float auto": {"scheme": "int8/min-max:int8-static", "keep_float": "auto", **BERT},
}
ROWS = EIGHT | MINILM | LITE | FOUR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-static-int8.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run, args.assets, args.results)))
        return 0
    results = Results(args.results)
    complete = run_rows(args.rows, results, ["--assets", args.assets, "--results", args.results])
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


def measure(row: str, assets: Path, results: Path) -> dict[str, Any]:
    """Run one row in this process: compress, write, read back, judge."""
    import copy

    import tersor
    from tersor.checkpoint.container_write import size_of

    model, task, data, name = opened(row, assets, results)
    for each in (task, data):
        each.prepare(model)
    fields, facts, compressed = ROWS[row], {}, model
    if fields:
        with Meter() as meter:
            made = tersor.compress(model, tersor.Recipe.of(**fields), data)
        with tempfile.TemporaryDirectory() as folder:
            tersor.save(made.model, folder)
            compressed = tersor.load(folder, model=None if row in MINILM else copy.deepcopy(model))
        facts = {"cpu": meter.costs.cpu, "kept": [choice.note() for choice in made.kept_float]}
    return {"row": row, "bytes": size_of(compressed), **judged(name, compressed, model, task, results), **facts}


def opened(row: str, assets: Path, results: Path) -> tuple[Any, Any, Any, str]:
    """The float model, the task, what calibrates, and the name under which the model's scores are kept."""
    from models import open_cifar, open_efficientnet, open_resnet

    import tersor

    if row in LITE:
        options = {"mean": 127 / 255, "std": 128 / 255, "calibration_examples": NUM_CALIBRATION}
        task = tersor.open_task("fidelity", large_images(assets, results), options=options)
        return open_efficientnet(assets), task, task, "lite0"
    if row in MINILM:
        return open_minilm(assets)
    depth, some = (56 if "56" in row else 20), ({"max_examples": NUM_IMAGES} if row in FOUR else {})
    name = f"resnet{depth}-{'some' if some else 'all'}"
    task = open_cifar(assets, **some)
    return open_resnet(assets, depth), task, task, name


def open_minilm(assets: Path) -> tuple[Any, Any, Any, str]:
    """Judged on STS-B dev, calibrated on web text: nothing of STS-B is seen."""
    from tersor.checkpoint.open import open_model
    from tersor.tasks.data import Data

    text, source = assets / "text", open_model(str(assets / "minilm"))
    options = {"max_length": 64, "max_examples": NUM_PASSAGES + 1, "calibration_examples": NUM_PASSAGES}
    data = Data("fidelity", text / "c4-sample.txt", options=options).open(source)
    return source.model, Data("similarity", text / "stsb-dev.csv").open(source), data, "minilm"


def large_images(assets: Path, results: Path) -> Path:
    """Images of CIFAR-10, enlarged to what an ImageNet model is used to, beside the results."""
    import numpy as np
    import torch
    from models import existing

    file = results.with_name(f"{results.stem}-images.npz")
    if not file.exists():
        x = np.load(existing(assets / "cifar10.npz"))["x_test"][: NUM_AGREEING + NUM_CALIBRATION]
        small = torch.from_numpy(x).permute(0, 3, 1, 2).float()
        large = torch.nn.functional.interpolate(small, size=SIDE, mode="bicubic").round().clamp(0, 255)
        np.savez(file, x=large.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    return file


def judged(name: str, model: Any, original: Any, task: Any, results: Path) -> dict[str, Any]:
    """Score and verdict; the original's scores are kept beside the results."""
    import numpy as np

    from tersor.measure.verdict import Tolerance, judge
    from tersor.tasks.scores import Scores

    scores = task.score(model)
    file = results.with_name(f"{results.stem}-{name}.npy")
    if not file.exists():
        np.save(file, (scores if model is original else task.score(original)).examples)
    before = Scores(scores.metric, np.load(file))
    verdict = judge(before, scores, Tolerance.parse("1%")).to_dict()
    return {"metric": scores.metric.name, "score": scores.value, "extras": scores.extras, "verdict": verdict}


def line(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    low, high = verdict["drop_interval"]
    drop = f"{verdict['drop']:+.4f} [{low:+.4f}, {high:+.4f}]" if "cpu" in result else "-"
    extras = "".join(f" {value:.4f} |" for name, value in result["extras"].items()) if "Lite0" in result["row"] else ""
    return f"| {result['row']} | {result['bytes'] / 1e6:.3f} | {result['score']:.4f} |{extras} {drop} |"


def page(done: dict[str, dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    tables = ["\n".join(line(done[row]) for row in rows if row in done) for rows in (EIGHT, FOUR, LITE, MINILM)]
    kept = "\n".join(f"- {row}: {note}" for row, result in done.items() for note in result.get("kept", []))
    lite = next((done[row] for row in LITE if row in done), {"extras": {}, "metric": "agreement"})
    num_agreeing = lite.get("verdict", {}).get("num_examples", NUM_AGREEING)
    bert = next((done[row]["verdict"]["original"] for row in MINILM if row in done), float("nan"))
    more = "".join(f" {name} |" for name in lite["extras"])
    return f"""# Static int8 in the model itself

Command: `python benchmarks/static_int8.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread. Weights in int8 per output channel, inputs of every
convolution and linear layer with one scale and zero point. Batch norms are folded unless a row says otherwise. Every
model was saved and read back before it was judged; drops with their 90 % interval.

## CIFAR-10, all 10,000 test images

Calibrated on 128 training images. `moving-average` takes runs of 4,096 inputs, a length chosen after 256 had
scored 0.8964 here.

| row | MB | accuracy | drop |
|---|---|---|---|
{tables[0]}

## 4-bit inputs, {NUM_IMAGES:,} test images

ResNet-20; int8 weights, first and last layer with 8-bit inputs: few codes, so that the observers differ.

| row | MB | accuracy | drop |
|---|---|---|---|
{tables[1]}

## EfficientNet-Lite0

Agreement with the float model on {num_agreeing} images of CIFAR-10 enlarged to {SIDE} x {SIDE}, calibrated on
{NUM_AGREEING + NUM_CALIBRATION - num_agreeing} others: there are no ImageNet
images here, so this is fidelity, not accuracy, on images unlike those it was trained on.

| row | MB | {lite["metric"]} |{more} drop |
|---|---|---|{"---|" * len(lite["extras"])}---|
{tables[2]}

## all-MiniLM-L6-v2, STS-B dev

Every linear layer of the blocks with int8 weights and inputs, embeddings in int8; calibrated on {NUM_PASSAGES} passages
of web text (C4) of at most 64 tokens. Spearman's rank correlation over all pairs that
are judged; the float model's is {bert:.4f}.

| row | MB | Spearman | drop |
|---|---|---|---|
{tables[3]}

## What was kept in float, and why

{kept}
"""


if __name__ == "__main__":
    sys.exit(main())
