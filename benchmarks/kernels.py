"""The kernels that run packed linear layers, by shape and number of tokens, and what they make of SmolLM2's decoding.

    python benchmarks/kernels.py --assets FOLDER [--layers] [--model FOLDER] [--as avx2] [--write]

Everything runs in turn in one process on one thread; times are of CPU, the least of several rounds for layers and the
median for models. `--layers` leaves the models out, which are `smollm2/` and `minilm/` in FOLDER (or TERSOR_ASSETS).
`--as avx2` has PyTorch, oneDNN, MKL and numba do without AVX-512. `--write` writes benchmarks/kernels.md, or
benchmarks/kernels_avx2.md.
"""

from __future__ import annotations

import os
import sys
import tempfile

# Before torch and numba are imported.
os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
os.environ.update(
    {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2",
        "NUMBA_CACHE_DIR": os.path.join(tempfile.gettempdir(), "tersor-avx2"),
    }
    if "avx2" in sys.argv
    else {}
)

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES, TOKENS = ((100, 300), (384, 384), (1536, 384), (2048, 2048)), (1, 8, 32, 128)
SCHEMES = {  # weights and inputs, what the model computes in
    "int8-dynamic": ("nearest:int8/int8-dynamic", torch.float32),
    "int8 in bf16": ("nearest:int8", torch.bfloat16),
    "int4-g32 in bf16": ("nearest:int4-g32", torch.bfloat16),
    "int8 in fp32": ("nearest:int8", torch.float32),
    "int4-g64 in fp32": ("nearest:int4-g64", torch.float32),
}
CONTEXT, NUM_NEW, NUM_ROUNDS = 64, 8, 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: smollm2 in the assets folder")
    parser.add_argument("--layers", action="store_true", help="leave the model out")
    parser.add_argument("--as", choices=["avx2"], dest="processor")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        layers = [layer_row(shape, num) for shape in SHAPES for num in TOKENS]
        print("\n".join(layers), flush=True)
        model = [] if args.layers else model_rows(args.model or Path(args.assets) / "smollm2")
        print("\n".join(model), flush=True)
        encoder = [] if args.layers else encoder_rows(Path(args.assets) / "minilm")
        print("\n".join(encoder))
    if args.write:
        name = f"kernels_{args.processor}.md" if args.processor else "kernels.md"
        Path(__file__).with_name(name).write_text(page(layers, model, encoder, args.processor))
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
            least[name] = min(least[name], cpu_of(lambda each=each, inputs=inputs: each(inputs), num_calls))
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


def encoder_rows(folder: Path) -> list[str]:
    """MiniLM, one sentence and 32 sentences of 32 tokens."""
    import tersor
    from tersor.checkpoint.open import open_model

    original = open_model(str(folder)).model.float()
    schemes = [name for name in SCHEMES if "bf16" not in name]
    models = {"fp32": original}
    for name in schemes:
        models[name] = tersor.compress(original, tersor.Recipe.of(SCHEMES[name][0])).model
    cells: dict[str, list[str]] = {name: [] for name in models}
    for batch in (1, 32):
        ids = torch.arange(batch * 32).view(batch, 32) + 1000
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(NUM_ROUNDS + 1):
            for name, model in models.items():
                spent = cpu_of(
                    partial(model, input_ids=ids, attention_mask=torch.ones_like(ids)), 5 if batch == 1 else 1
                )
                times[name] += [spent] if number else []
        for name in models:
            ratio = statistics.median(a / b for a, b in zip(times["fp32"], times[name], strict=True))
            cells[name] += [f"{1e3 * statistics.median(times[name]):.1f}", f"{ratio:.2f}x"]
    return [f"| {name} | {' | '.join(each)} |" for name, each in cells.items()]


def step(model: Any, cache: Any) -> None:
    """One more token."""
    model(torch.tensor([[1234]]), past_key_values=cache, use_cache=True)


def page(layers: list[str], model: list[str], encoder: list[str], processor: str | None) -> str:
    from tersor.measure.scorecard import machine

    about, newline = machine(), "\n"
    flag = f" --as {processor}" if processor else ""
    limits = (
        "\nPyTorch, oneDNN, MKL and numba do without AVX-512, by their environment variables.\n" if processor else ""
    )
    smollm2 = f"""
## SmolLM2-135M-Instruct, decoding

One token at a time at batch 1, after {CONTEXT} tokens of context, in turn; {NUM_ROUNDS} rounds of {NUM_NEW} tokens.
Linear layers of the decoder packed by `nearest`, embeddings and head in the model's type. MB: of all tensors in memory,
what kernels laid out besides included.

| | MB in memory | ms per token | tokens per second | against fp32 | against bf16 |
|---|---|---|---|---|---|
{newline.join(model)}

## all-MiniLM-L6-v2

Milliseconds, and the median ratio over {NUM_ROUNDS} rounds, in turn.

| | ms at 1 x 32 tokens | against fp32 | ms at 32 x 32 | against fp32 |
|---|---|---|---|---|
{newline.join(encoder)}
"""
    return f"""# Kernels

Command: `python benchmarks/kernels.py --assets FOLDER{flag} --write`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}; {about["processor"]}
({about["cpu_capability"]}), one thread, on a machine that others used too.
{limits}
## One linear layer

Microseconds of CPU, with the kernel that was chosen by measuring; inputs are quantized inside.

| out x in | tokens | fp32 | bf16 | {" | ".join(SCHEMES)} |
|---|---|---|---|{"---|" * len(SCHEMES)}
{newline.join(layers)}
{smollm2 if model else ""}"""


if __name__ == "__main__":
    sys.exit(main())
