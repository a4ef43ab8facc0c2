"""The kernels that run packed linear layers, by shape and number of tokens, and what they make of SmolLM2's decoding.

    python benchmarks/kernels.py --assets FOLDER [--layers] [--model FOLDER] [--write]

Everything runs in turn in one process on one thread; times are of CPU, the least of several rounds for layers and the
median for the model. `--layers` leaves the model out, which takes `smollm2/` from FOLDER (or TERSOR_ASSETS); `--write`
writes benchmarks/kernels.md.
"""

from __future__ import annotations

import os

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES, TOKENS = ((384, 384), (1536, 384), (1024, 1024), (2048, 2048)), (1, 8, 32, 128)
SCHEMES = {  # weights and inputs, what the model computes in
    "int8-dynamic": ("nearest:int8/int8-dynamic", torch.float32),
    "int8 in bf16": ("nearest:int8", torch.bfloat16),
    "int4-g32 in bf16": ("nearest:int4-g32", torch.bfloat16),
    "int4-g32 in fp32": ("nearest:int4-g32", torch.float32),
}
CONTEXT, NUM_NEW, NUM_ROUNDS = 64, 8, 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: smollm2 in the assets folder")
    parser.add_argument("--layers", action="store_true", help="leave the model out")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        layers = [layer_row(shape, num) for shape in SHAPES for num in TOKENS]
        print("\n".join(layers), flush=True)
        model = [] if args.layers else model_rows(args.model or Path(args.assets) / "smollm2")
        print("\n".join(model))
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(layers, model))
    return 0


def cpu_of(run: Callable[[], object], num_calls: int = 1) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    for _ in range(num_calls):
        run()
    return (time.process_time() - started) / num_calls


def layer_row(shape: tuple[int, int], num_tokens: int) -> str:
    """Microseconds of one layer."""
    import tersor
    from tersor.kernels import kernel_of

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).eval()
    x = torch.randn(num_tokens, shape[1])
    runs: dict[str, tuple[nn.Module, Tensor]] = {
        "fp32": (model, x),
        "bf16": (copy.deepcopy(model).bfloat16(), x.bfloat16()),
    }
    for name, (scheme, dtype) in SCHEMES.items():
        runs[name] = (tersor.compress(model, tersor.Recipe.of(scheme)).model.to(dtype), x.to(dtype))
    num_calls = max(3, 2**24 // (shape[0] * shape[1] * num_tokens))
    for each, inputs in runs.values():
        each(inputs)
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(5):
        for name, (each, inputs) in runs.items():
            calls = 3 if "fp32" in name and name != "fp32" else num_calls
            least[name] = min(least[name], cpu_of(lambda each=each, inputs=inputs: each(inputs), calls))
    cells = [f"{1e6 * least['fp32']:.0f}", f"{1e6 * least['bf16']:.0f}"]
    for name in SCHEMES:
        cells.append(f"{1e6 * least[name]:.0f} {kernel_of(runs[name][0][0], num_tokens)}")
    return f"| {shape[0]} x {shape[1]} | {num_tokens} | {' | '.join(cells)} |"


def model_rows(folder: Path) -> list[str]:
    """SmolLM2, one token at a time after a context, with a cache of keys and values."""
    import tersor
    from tersor.checkpoint.open import open_model
    from tersor.measure.size import measure_size

    if not (folder / "config.json").exists():
        raise SystemExit(f"needs {folder}: give --assets FOLDER, --model FOLDER, or --layers")
    original = open_model(str(folder)).model.float()
    models: dict[str, Any] = {"fp32": original, "bf16": copy.deepcopy(original).bfloat16()}
    for name, (scheme, dtype) in SCHEMES.items():
        recipe = tersor.Recipe.of(scheme, exclude=["*embed_tokens"])
        models[name] = tersor.compress(original, recipe).model.to(dtype)
    ids = torch.arange(CONTEXT).view(1, -1) + 1000
    caches = {name: model(ids, use_cache=True).past_key_values for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(NUM_ROUNDS + 1):
        for name, model in models.items():
            spent = cpu_of(lambda model=model, name=name: step(model, caches[name]), NUM_NEW)
            times[name] += [spent] if number else []  # the first round measures kernels
    median = {name: statistics.median(each) for name, each in times.items()}
    return [
        f"| {name} | {measure_size(model).num_bytes / 1e6:.0f} | {1e3 * median[name]:.1f} | {1 / median[name]:.0f} | "
        f"{median['fp32'] / median[name]:.2f}x | {median['bf16'] / median[name]:.2f}x |"
        for name, model in models.items()
    ]


def step(model: Any, cache: Any) -> None:
    """One more token."""
    model(torch.tensor([[1234]]), past_key_values=cache, use_cache=True)


def page(layers: list[str], model: list[str]) -> str:
    from tersor.measure.scorecard import machine

    about, newline = machine(), "\n"
    smollm2 = f"""
## SmolLM2-135M-Instruct, decoding

One token at a time at batch 1, after {CONTEXT} tokens of context, in turn; {NUM_ROUNDS} rounds of {NUM_NEW} tokens.
Linear layers of the decoder packed by `nearest`, embeddings and head in the model's type. MB: of all tensors in memory,
what kernels laid out besides included.

| | MB in memory | ms per token | tokens per second | against fp32 | against bf16 |
|---|---|---|---|---|---|
{newline.join(model)}
"""
    return f"""# Kernels

Command: `python benchmarks/kernels.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}; {about["processor"]}
({about["cpu_capability"]}), one thread, on a machine that others used too.

## One linear layer

Microseconds of CPU, with the kernel that was chosen by measuring; inputs are quantized inside.

| out x in | tokens | fp32 | bf16 | {" | ".join(SCHEMES)} |
|---|---|---|---|{"---|" * len(SCHEMES)}
{newline.join(layers)}
{smollm2 if model else ""}"""


if __name__ == "__main__":
    sys.exit(main())
