"""Deep Compression today: prune, retrain, share steps, code. LeNets on MNIST; ResNet-20 on CIFAR-10, not pruned.

    python benchmarks/coded_vision.py --assets FOLDER [--rows ROW ...] [--peer-python VENV/bin/python]
        [--results FILE] [--write]

A row is `MODEL PRUNED SETTING`. The LeNets are trained here first, pruned by the step `prune` with the original as
teacher beside the labels, then coded. A setting is

`2e-3`: coded by `waterfill(level=2e-3):coded`, and scales tuned for an epoch if the model was pruned: docs/coded.md;
`95kB`: the size that the search for levels is to meet, before scales are tuned;
`kmeans`: the recipe of the paper by the command line: prune, retrain, share 16 values by k-means, retrain these, and
    `tersor pack`;
`gptq:int4`: any other scheme, in `model.safetensors`;
`nncodec(-24)`: NNCodec at this qp (all else as it comes), in an environment of its own: `pip install nncodec`.

ResNet-20 comes as it was trained by others. Every file is loaded back and tested on all 10,000 test images; the
LeNets' also on 10,000 training digits, by which a level may be chosen without a look at the test. Results are appended
to FILE (JSON lines), so that a run that was stopped goes on where it was; models that rows share are kept beside it.
`--write` puts everything in FILE into coded_vision.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import yaml
from models import LeNet5, LeNet300100, ResNetCifar, fresh, open_cifar, open_mnist, open_resnet, resnet_file
from rows import Results
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.calibration.curvature import estimate_fisher
from tersor.checkpoint.layout import CODED
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.search.choices import NUM_STATES
from tersor.search.limit import Limit, parse_size
from tersor.search.noise_level import NoiseLevelSearch
from tersor.tasks.contract import Task
from tersor.training import FinetuneStep, Job, TuneScalesStep

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
    *(f"lenet-300-100 95% {setting}" for setting in ("kmeans", "2e-3", "5e-3", "8e-3", "15kB", "13kB")),
    *(f"lenet-5 97% {setting}" for setting in ("kmeans", "1e-3", "2e-3", "13kB", "11kB", "9kB")),
    *(f"resnet-20 0% {size}" for size in ("150kB", "110kB", "95kB", "85kB", "75kB")),
    "resnet-20 0% gptq:int4",
    *(f"resnet-20 0% nncodec({qp})" for qp in (-26, -24, -22, -20, -18)),
]
NUM_TRAINED = 10_000  # training digits on which the LeNets are judged, too
SHARED = "kmeans:codebook16-tensor"
CODE_BY_PEER = """
import sys
from unittest.mock import MagicMock
try:
    import torchvision
except Exception:  # its wheels may want CUDA; to code plain arrays, NNCodec does not use it
    for name in ("", ".models", ".transforms", ".transforms.functional", ".datasets"):
        sys.modules["torchvision" + name] = MagicMock()
import numpy as np
from importlib.metadata import version
from nncodec.nn import decode, encode
from safetensors.numpy import load_file, save_file
weights = {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in load_file(sys.argv[1]).items()}
stream = encode(weights, args={"qp": int(sys.argv[3]), "verbose": False})
back = decode(stream)
save_file({name: np.asarray(back[name], np.float32).reshape(w.shape) for name, w in weights.items()}, sys.argv[2])
print(version("nncodec"), len(stream))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--peer-python", type=Path, help="the interpreter of an environment with nncodec")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-vision.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    left = [row for row in args.rows if row not in results]
    if args.peer_python is None and any("nncodec" in row for row in left):
        parser.error("the rows of NNCodec need --peer-python; without it, name others with --rows")
    for row in left:
        found = measure(row, args.assets, args.results.with_suffix(".models"), args.peer_python)
        print(line(results.add(row, found)), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return 0


def measure(row: str, assets: Path, folder: Path, peer_python: Path | None) -> dict[str, Any]:
    """Prune where asked, code, tune, load the file back, and judge it."""
    name, percent, setting = row.split()
    sparsity = float(percent.removesuffix("%")) / 100
    folder.mkdir(parents=True, exist_ok=True)
    task = open_cifar(assets, calibration_examples=512) if name == "resnet-20" else open_mnist(assets)
    model, file_bytes = open_original(name, assets, task, folder)
    before = task.score(model)
    began, facts = time.process_time(), {}
    if setting.startswith("nncodec"):
        assert peer_python is not None
        loaded, num_bytes, version = by_nncodec(name, int(setting[8:-1]), assets, peer_python)
        facts = {"nncodec": version}
    elif setting == "kmeans":
        loaded, num_bytes = by_command_line(name, sparsity, assets, folder)
    else:
        pruned = open_pruned(name, sparsity, model, task, folder)
        began = time.process_time()
        made = coded(setting, pruned, task, TUNING if sparsity else {})
        with tempfile.TemporaryDirectory() as artifact:
            tersor.save(made, artifact)
            loaded = tersor.load(artifact, model=KINDS[name]())
            num_bytes = max((Path(artifact) / file).stat().st_size for file in os.listdir(artifact))
        facts = {"pruned": task.score(pruned).value} if sparsity else {}
    cpu = time.process_time() - began
    scores = task.score(loaded)
    if sparsity:
        digits = open_trained_digits(assets, folder)
        facts |= {"trained": judge(digits.score(model), digits.score(loaded), TOLERANCE).drop}
    return {
        "original": {"accuracy": before.value, "bytes": file_bytes},
        "bytes": num_bytes,
        "bits": 8 * num_bytes / sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": scores.value,
        "verdict": judge(before, scores, TOLERANCE).to_dict(),
        "cpu": cpu,
        **facts,
    }


def coded(setting: str, model: nn.Module, task: Task, tuning: dict[str, Any]) -> nn.Module:
    """At a level, in a size, or by a scheme."""
    stats = estimate_fisher(model, task)
    if setting.endswith("kB"):
        searching = NoiseLevelSearch(model, task, tersor.Recipe.of("keep").weights[0], stats, num_states=NUM_STATES)
        job = Job(searching.within(Limit(parse_size(setting), setting)).made.model, model, task)
        if tuning:
            TuneScalesStep(**tuning).run(job)
        return job.model
    is_level = re.fullmatch(r"[\d.e-]+", setting)
    steps: list[dict[str, Any]] = [{"scheme": f"waterfill(level={setting}):coded" if is_level else setting}]
    if tuning:
        steps.append({"step": "tune-scales", **tuning})
    return tersor.compress(model, tersor.Recipe.model_validate({"steps": steps}), task, stats=stats).model


def by_command_line(name: str, sparsity: float, assets: Path, folder: Path) -> tuple[nn.Module, int]:
    """Prune, retrain, share, retrain what is shared, code: a recipe, and two commands."""
    steps = [
        {"step": "prune", "sparsity": sparsity, **PRUNING[name]},
        {"step": "weights", "scheme": SHARED},
        {"step": "tune-scales", **TUNING},
    ]
    with tempfile.TemporaryDirectory() as place:
        recipe, shared, packed, plain = (Path(place) / each for each in ("recipe.yaml", "shared", "packed", "plain"))
        recipe.write_text(yaml.safe_dump({"steps": steps}))
        weights, data = folder / f"{name}.safetensors", assets / "vision" / "mnist.npz"
        model = ["compress", f"models:{KINDS[name].__name__}", "--weights", weights, "--recipe", recipe]
        tersor_command(*model, "--task", "classification", "--data", data, "--batch", "1", "-o", shared)
        tersor_command("pack", shared, "-o", packed)
        tersor_command("unpack", packed, "-o", plain)
        loaded = KINDS[name]().eval()
        loaded.load_state_dict(load_file(plain / "model.safetensors"))
        return loaded, (packed / CODED).stat().st_size


def tersor_command(*arguments: object) -> None:
    """`tersor ARGUMENTS`, with the models of this folder at hand."""
    command = [sys.executable, "-c", "from tersor.cli import main; main()", *map(str, arguments)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True, stdout=subprocess.DEVNULL)


def by_nncodec(name: str, qp: int, assets: Path, python: Path) -> tuple[nn.Module, int, str]:
    """Its decoded model, the bytes of its stream, and its version."""
    with tempfile.TemporaryDirectory() as place:
        back = Path(place) / "back.safetensors"
        command = [str(python), "-c", CODE_BY_PEER, str(resnet_file(assets).absolute()), str(back), str(qp)]
        done = subprocess.run(command, cwd=place, capture_output=True, check=True)
        model = KINDS[name]().eval()
        model.load_state_dict(load_file(back), strict=False)
    version, num_bytes = done.stdout.decode().split()[-2:]
    return model, int(num_bytes), version


def open_trained_digits(assets: Path, folder: Path) -> Task:
    """The first training digits, to be judged."""
    path = folder / "trained-digits.npz"
    if not path.exists():
        with np.load(assets / "vision" / "mnist.npz") as data:
            np.savez(path, x=data["x_train"][:NUM_TRAINED], y=data["y_train"][:NUM_TRAINED])
    return tersor.open_task("classification", path)


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


def open_pruned(name: str, sparsity: float, model: nn.Module, task: Task, folder: Path) -> nn.Module:
    """The pruned model. It is pruned the first time."""
    if not sparsity:
        return model
    path = folder / f"{name}-{sparsity}.safetensors"
    if not path.exists():
        step = {"step": "prune", "sparsity": sparsity, **PRUNING[name]}
        made = tersor.compress(model, tersor.Recipe.model_validate({"steps": [step]}), task)
        save_file(made.model.state_dict(), path)
    pruned = KINDS[name]().eval()
    pruned.load_state_dict(load_file(path))
    return pruned


def line(result: dict[str, Any]) -> str:
    verdict, (name, percent, setting) = result["verdict"], result["row"].split()
    low, high = (100 * edge for edge in verdict["drop_interval"])
    cells = [
        *([name, percent, f"`{setting}`"] if percent != "0%" else [f"`{setting}`"]),
        f"{result['bytes'] / 1e3:.1f}",
        f"{result['original']['bytes'] / result['bytes']:.1f}",
        f"{result['bits']:.3f}",
        *(
            [f"{100 * result['pruned']:.2f}" if "pruned" in result else "", f"{100 * result['trained']:+.2f}"]
            if percent != "0%"
            else []
        ),
        f"{100 * result['accuracy']:.2f}",
        f"{100 * verdict['drop']:+.2f} [{low:+.2f}, {high:+.2f}] {verdict['outcome']}",
    ]
    return f"| {' | '.join(cells)} |"


def page(results: Results) -> str:
    about = machine()
    lenets = [result for result in results.among(ROWS) if result["row"].startswith("lenet")]
    resnets = [result for result in results.among(ROWS) if result["row"].startswith("resnet")]
    versions = {result["nncodec"] for result in resnets if "nncodec" in result}
    originals = {result["row"].split()[0]: result["original"] for result in lenets + resnets}
    accuracy = {name: f"{100 * original['accuracy']:.2f} %" for name, original in originals.items()}
    listing = {"lenet": "\n".join(map(line, lenets)), "resnet": "\n".join(map(line, resnets))}
    return f"""# Deep Compression: prune, retrain, share, code

Command: `python benchmarks/coded_vision.py --assets FOLDER --peer-python VENV/bin/python --write`

tersor {about["tersor"]}, torch {about["torch"]}, NNCodec {", ".join(versions)}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread.

kB are of the whole file: header, biases, norms and tables are inside. `smaller` is against the original's float32 file,
bits are over all parameters. Accuracy is on all 10,000 test images, of the file loaded back; its drop against the
original is in points, with the 90 % interval judged at a tolerance of 0.3 points.

## LeNets on MNIST

Originals, trained here: LeNet-300-100 {accuracy.get("lenet-300-100", "")}, LeNet-5 {accuracy.get("lenet-5", "")}. A
number is the level of `waterfill`, the same for all sites; a size is what the search for levels was to meet, each
corrected by what its site costs; then scales are tuned. `kmeans` is the recipe of the paper by the command line:
prune and retrain, 16 values for each layer by k-means, one of them zero, retrain these, `tersor pack`. *Trained*: the
drop in points on {NUM_TRAINED:,} training digits, by which a level may be chosen without a look at the test. The paper
(Han et al. 2016) has 27 kB (40x) and 44 kB (39x).

| model | pruned | setting | kB | smaller | bits | pruned % | trained | coded % | drop, verdict |
|---|---|---|---|---|---|---|---|---|---|
{listing["lenet"]}

## ResNet-20 on CIFAR-10

The original has {accuracy.get("resnet-20", "")}. A size is what the search for a level is to meet, {NUM_STATES} states,
in `model.tersor`. NNCodec, the software of ISO/IEC 15938-17, codes all tensors of the same file by trellis-coded
quantization and its context coder, without data; in brackets is its qp, all else as it comes. `gptq:int4`: a scale for
each row, in `model.safetensors`.

| setting | kB | smaller | bits | coded % | drop, verdict |
|---|---|---|---|---|---|
{listing["resnet"]}
"""


if __name__ == "__main__":
    sys.exit(main())
