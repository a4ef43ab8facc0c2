"""How fast entropy-coded weights load into float, beside the fp32 safetensors file of the same model.

    python benchmarks/coded_loading.py --assets FOLDER [--artifact FOLDER] [--repeat 9] [--write]

FOLDER (or TERSOR_ASSETS) holds `minilm/` (all-MiniLM-L6-v2, a Hugging Face folder). Its weights, embeddings included,
are rounded to `coded` (or taken from `--artifact`, saved so before) and lie in one `model.tersor`. Everything runs in
one process, in turns, from a warm cache; medians, lowest to highest. One thread: CPU seconds of the process, so that
other work on the machine does not count. Two threads: seconds on the clock, which it does disturb: compare them only
with the fp32 row by the clock. Whole models, as a user opens them: `tersor.load` of either file, its hash checked, and
`AutoModel.from_pretrained` of the original, of which every weight is read once, for it only maps the file. What is
decoded is compared bit for bit with decoding integers and scaling them in torch. Beside it codes along the paths of a
trellis of 64 states. `--write` makes coded_loading.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

import tersor
from tersor.checkpoint.container import Container
from tersor.checkpoint.open import open_model
from tersor.checkpoint.restore import read_decoded
from tersor.codecs.integers import Integers
from tersor.formats import format_named
from tersor.formats.contract import Encoded
from tersor.measure.scorecard import machine
from tersor.recipe import Recipe

Shapes = dict[str, tuple[int, int]]
PATHS = "waterfill(level=1.7e-4, num_states=64):coded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"))
    parser.add_argument("--artifact", type=Path, help="a folder with a model.tersor, instead of rounding the model")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    plain = Path(args.assets or ".") / "minilm" / "model.safetensors"
    if not plain.exists():
        print(f"needs {plain}: give --assets FOLDER", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        coded = args.artifact
        if coded is None:
            coded = Path(scratch) / "coded"
            made = tersor.compress(open_model(str(plain.parent)).model, Recipe.of("coded"))
            tersor.save(made.model, coded, coded=True)
        paths = Path(scratch) / "paths"
        made = tersor.compress(open_model(str(plain.parent)).model, Recipe.of(PATHS))
        tersor.save(made.model, paths, coded=True)
        text = page(measure(coded / "model.tersor", paths / "model.tersor", plain, args.repeat))
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text)
    return 0


def measure(coded: Path, paths: Path, plain: Path, repeat: int) -> dict[str, Any]:
    """All times, taken in turns."""
    container = Container(coded)
    codes = {name: entry for name, entry in container.entries.items() if name.endswith(".weight.codes")}
    shapes: Shapes = {name.removesuffix(".codes"): (e.shape[0], e.shape[1]) for name, e in codes.items()}
    for file in (coded, paths):
        check(file, shapes)
    numbers = list(container.tensors(list(codes)).values())

    def into_float(num_threads: int, file: Path = coded) -> None:
        read_decoded(file, shapes, num_threads)

    def fp32() -> list[Tensor]:
        return [tensor.clone() for tensor in load_file(plain).values()]

    def from_pretrained() -> list[Tensor]:
        model = AutoModel.from_pretrained(plain.parent, dtype=torch.float32)
        return [parameter.sum() for parameter in model.parameters()]

    work: dict[str, tuple[Callable[[], Any], Callable[[], float], int]] = {
        "encode": (lambda: [Integers().encode(each) for each in numbers], time.process_time, 2),
        "integers": (lambda: Container(coded).tensors(num_threads=1), time.process_time, repeat),
        "float": (lambda: into_float(1), time.process_time, repeat),
        "paths": (lambda: into_float(1, paths), time.process_time, repeat),
        "fp32": (fp32, time.process_time, repeat),
        "float, two threads": (lambda: into_float(2), time.perf_counter, repeat),
        "paths, two threads": (lambda: into_float(2, paths), time.perf_counter, repeat),
        "fp32, clock": (fp32, time.perf_counter, repeat),
        "load": (lambda: tersor.load(coded.parent, packed=False), time.perf_counter, repeat),
        "load paths": (lambda: tersor.load(paths.parent, packed=False), time.perf_counter, repeat),
        "from_pretrained": (from_pretrained, time.perf_counter, repeat),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeat + 1):  # the first to have everything compiled and cached
        for name, (run, clock, most) in work.items():
            if turn <= most:
                start = clock()
                kept = run()
                taken = clock() - start
                del kept
                if turn:
                    seconds[name].append(taken)
    return {
        "seconds": seconds,
        "num_weights": sum(rows * columns for rows, columns in shapes.values()),
        "bytes": coded.stat().st_size,
        "path_bytes": paths.stat().st_size,
        "plain_bytes": plain.stat().st_size,
    }


def check(coded: Path, shapes: Shapes) -> None:
    """One pass gives the bits that two give."""
    tensors, (_, matrices) = Container(coded).tensors(), read_decoded(coded, shapes)
    kind = format_named("coded")
    for parameter, shape in shapes.items():
        parts = {part: tensors[f"{parameter}.{part}"] for part in kind.layout(shape)}
        if not torch.equal(matrices[parameter], Encoded(kind, shape, parts).decode()):
            raise SystemExit(f"{parameter} is decoded to something else in one pass than in two")


def page(found: dict[str, Any]) -> str:
    """coded_loading.md."""
    info, seconds, millions = machine(), found["seconds"], found["num_weights"] / 1e6
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    rows = [
        ("encode, one thread", "encode", None),
        ("decode into integers, one thread", "integers", None),
        ("decode into float, one thread", "float", "fp32"),
        ("the same along paths of 64 states", "paths", "fp32"),
        ("decode into float, two threads", "float, two threads", "fp32, clock"),
        ("the same along paths of 64 states", "paths, two threads", "fp32, clock"),
        ("fp32 safetensors, copied into memory of its own", "fp32", None),
        ("the same by the clock", "fp32, clock", None),
        ("`tersor.load`, two threads", "load", "from_pretrained"),
        ("the same along paths of 64 states", "load paths", "from_pretrained"),
        ("`AutoModel.from_pretrained`, and every weight read", "from_pretrained", None),
    ]
    lines = [
        "# Loading coded weights",
        "",
        f"`python benchmarks/coded_loading.py --assets FOLDER --write`; tersor {info['tersor']}, torch "
        f"{info['torch']}, numba {version('numba')}, {info['processor']}. all-MiniLM-L6-v2, {millions:.1f} million "
        f"weights: `model.tersor` of {found['bytes'] / 1e6:.2f} MB, and one of `{PATHS}` of "
        f"{found['path_bytes'] / 1e6:.2f} MB, beside `model.safetensors` of "
        f"{found['plain_bytes'] / 1e6:.2f} MB, from a warm cache, in turns in one process. Seconds: of the CPU with "
        "one thread, on the clock with two and where it says so; median (lowest to highest). The hash of the whole "
        "file is in the time of `tersor.load` alone; the checksums of the chunks are in all. The machine is shared.",
        "",
        "| work | seconds | million weights/s | times fp32 |",
        "|---|---|---|---|",
    ]
    for label, name, beside in rows:
        spread = f"{middle[name]:.3f} ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})"
        ratio = f"{middle[name] / middle[beside]:.2f}" if beside else ""
        lines.append(f"| {label} | {spread} | {millions / middle[name]:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
