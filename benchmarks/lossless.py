"""Lossless packing of a trained model, beside ZipNN in the same process.

    python benchmarks/lossless.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

FOLDER (or TERSOR_ASSETS) holds `minilm/` (all-MiniLM-L6-v2, a Hugging Face folder). Rows `bf16`, `fp16`, `fp32`: all
matrices of the model in that type (rounded from fp32; `fp32 of fp16`: and widened again), packed and unpacked by both
tools in turns, on one thread; the times are CPU seconds of the process, medians of the repetitions, so that other work
on the machine does not count.
Each row is appended to FILE (JSON lines); `--write` puts everything in FILE into lossless.md. ZipNN is optional: pip
install zipnn.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rows import Results
from safetensors.torch import load_file
from torch import Tensor

from tersor.codecs.contract import Pieces
from tersor.codecs.floats import Floats
from tersor.codecs.raw import bytes_of
from tersor.measure.scorecard import machine

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp32 of fp16": torch.float32}
ROWS = list(TYPES)
ZIPNN_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-lossless.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    folder = Path(args.assets or ".") / "minilm"
    if not (folder / "model.safetensors").exists():
        print(f"needs {folder / 'model.safetensors'}: give --assets FOLDER", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    results = Results(args.results)
    for row in args.rows:
        if row not in results:
            print(json.dumps(results.add(row, packing(folder, row, args.repeat))), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results.among(ROWS)))
    return 0


def packing(folder: Path, row: str, repeat: int) -> dict[str, Any]:
    """Sizes and speeds of both tools on the same tensors, in turns."""
    whole = [t for t in load_file(folder / "model.safetensors").values() if t.dim() == 2 and t.is_floating_point()]
    tensors = [(t.half() if row == "fp32 of fp16" else t).to(TYPES[row]) for t in whole]
    tools = {"tersor": (Floats().encode, unpacked)} | zipnn(row)
    num_bytes = sum(t.nbytes for t in tensors)
    found: dict[str, Any] = {}
    for name, (encode, decode) in tools.items():  # once for the check, and to have everything compiled
        coded = [encode(t) for t in tensors]
        for tensor, each in zip(tensors, coded, strict=True):
            if bytes_of(decode(each, tensor)) != bytes_of(tensor):
                raise SystemExit(f"{name} does not give back {row}")
        sizes = [each.num_bytes if isinstance(each, Pieces) else len(each) for each in coded]
        found[name] = {"share": sum(sizes) / num_bytes, "encode": [], "decode": []}
    for _ in range(repeat):
        for name, (encode, decode) in tools.items():
            seconds, coded = timed(lambda encode=encode: [encode(t) for t in tensors])
            found[name]["encode"].append(num_bytes / seconds / 1e6)
            work = list(zip(coded, tensors, strict=True))
            seconds, _ = timed(lambda decode=decode, work=work: [decode(each, t) for each, t in work])
            found[name]["decode"].append(num_bytes / seconds / 1e6)
    return {"row": row, "bytes": num_bytes, "tools": found, "about": about()}


def unpacked(pieces: Pieces, like: Tensor) -> Tensor:
    """A tensor back, on this thread."""
    chunks = [memoryview(chunk) for chunk in pieces.chunks]
    decoding = Floats().decode(memoryview(pieces.head), chunks, like.dtype, tuple(like.shape))
    for task in decoding.tasks:
        task()
    return decoding.tensor


def zipnn(row: str) -> dict[str, tuple[Callable, Callable]]:
    """The other tool, where it is installed. It works on bytes, and changes those it is given."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return {}
    tool = ZipNN(input_format="byte", bytearray_dtype=ZIPNN_TYPES[TYPES[row]], threads=1)

    def decode(coded: bytes, like: Tensor) -> Tensor:
        return torch.frombuffer(bytearray(tool.decompress(coded)), dtype=like.dtype).view(like.shape)

    return {"zipnn": (lambda tensor: tool.compress(bytearray(bytes_of(tensor))), decode)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def about() -> dict[str, Any]:
    """Versions and machine."""
    try:
        zipnn_version = version("zipnn")
    except PackageNotFoundError:
        zipnn_version = "-"
    return {**machine(), "zipnn": zipnn_version, "numba": version("numba")}


def middle(values: list[float]) -> str:
    """Median, and how far the runs are apart."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def page(results: list[dict[str, Any]]) -> str:
    """lossless.md."""
    info = results[0]["about"]
    lines = [
        "# Lossless packing",
        "",
        f"`python benchmarks/lossless.py --assets FOLDER --write`; tersor {info['tersor']}, torch {info['torch']}, "
        f"numba {info['numba']}, zipnn {info['zipnn']}, {info['processor']}, one thread. all-MiniLM-L6-v2, all "
        "matrices, rounded from fp32 (and widened again: `fp32 of fp16`); every tool's output was checked bit for bit. "
        "MB/s of the original bytes by CPU time, median (lowest to highest).",
        "",
        "| type | tool | size | encode MB/s | decode MB/s |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        for name, tool in result["tools"].items():
            speeds = f"{middle(tool['encode'])} | {middle(tool['decode'])}"
            lines.append(f"| {result['row']} | {name} | {100 * tool['share']:.2f} % | {speeds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
