"""tersor beside other tools: the same model, the same tokens, the same machine, one process after the other.

    python benchmarks/peers.py --assets FOLDER --peer-python VENV/bin/python [--rows TEXT ...] [--write]

VENV is an environment of its own with `pip install torch llmcompressor auto-round`. The protocol is that of
protocol.py. Every tool runs in a fresh process on two threads, is given the calibration tokens, and leaves its weights
dequantized in a file; one evaluator then scores all of them in float32. `--write` puts the table into
benchmarks/peers.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from protocol import (
    CONTEXT,
    KEPT,
    Assets,
    Meter,
    add_asset_options,
    evaluate,
    open_original,
    open_protocol,
)
from rows import child_environment, last_line

if TYPE_CHECKING:
    from torch import Tensor, nn

NUM_THREADS = 2
GROUP_SIZE = 64
NUM_ROUNDS = 40  # of the 200 that auto-round makes by default
PACKAGES = ["tersor", "llmcompressor", "compressed-tensors", "auto-round", "transformers", "torch"]


class Row(NamedTuple):
    """A tool and what it is asked for: a grid of `bits` in groups of 64, in a model loaded as `dtype`."""

    tool: str
    method: str
    bits: int
    symmetric: bool = True
    dtype: str = "bfloat16"

    @property
    def setting(self) -> str:
        return f"{self.method}:int{self.bits}-g{GROUP_SIZE}{'' if self.symmetric else '-asym'}"

    @property
    def name(self) -> str:
        return f"{self.tool} {self.setting}" + ("" if self.dtype == "bfloat16" else f" in {self.dtype}")


ROWS = [
    Row("llmcompressor", "gptq", 4, symmetric=False),
    Row("tersor", "gptq", 4),
    Row("tersor", "gptq(upstream_correction=0)", 4),
    Row("llmcompressor", "gptq", 3, symmetric=False),
    Row("tersor", "gptq", 3),
    Row("llmcompressor", "gptq", 2, symmetric=False),
    Row("tersor", "gptq", 2),
    Row("auto-round", "autoround", 3),
    Row("tersor", "autoround", 3),
    Row("auto-round", "autoround", 2),
    Row("tersor", "autoround", 2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--peer-python", type=Path, help="the interpreter of the peers' environment")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("ROW", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        run(ROWS[int(args.run[0])], assets, Path(args.run[1]))
        return 0
    rows = [row for row in ROWS if any(text in row.name for text in args.rows)]
    if args.peer_python is None and any(row.tool != "tersor" for row in rows):
        parser.error("the peers need --peer-python; without it, choose --rows tersor")
    python = {tool: str(args.peer_python) for tool in TOOLS} | {"tersor": sys.executable}
    results, versions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_tokens(assets, Path(folder))
        for row in rows:
            command = [python[row.tool], __file__, *assets.options, "--run", str(ROWS.index(row)), folder]
            done = subprocess.run(command, env=child_environment(NUM_THREADS), capture_output=True)
            if done.returncode:
                print(f"{row.name}: {last_line(done.stderr)}", file=sys.stderr, flush=True)
                continue
            report = json.loads((Path(folder) / "report.json").read_text())
            versions |= report["versions"]
            results.append(line(row, report, assets, Path(folder)))
            print(results[-1], flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results, versions))
    return int(len(results) < len(rows))


# In the tool's own process.


def run(row: Row, assets: Assets, folder: Path) -> None:
    """Compress; leave the dequantized weights, and what they cost, in `folder`."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(NUM_THREADS)
    meter = Meter()
    model, bits = TOOLS[row.tool](row, assets, np.load(folder / "tokens.npy"), meter)
    save_file(decoder_weights(model), folder / "weights.safetensors")
    found = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    report = {"bits": bits, "costs": meter.costs.to_dict(), "versions": found}
    (folder / "report.json").write_text(json.dumps(report))


def run_llmcompressor(row: Row, assets: Assets, ids: Any, meter: Meter) -> tuple[nn.Module, float]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=getattr(torch, row.dtype))
    tokens = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * CONTEXT] * len(ids)})
    grid = QuantizationArgs(num_bits=row.bits, symmetric=row.symmetric, strategy="group", group_size=GROUP_SIZE)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    gptq = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    with meter:
        oneshot(model=model, dataset=tokens, recipe=gptq, num_calibration_samples=len(ids), max_seq_length=CONTEXT)
    return model, bits_with_zero_point(row)


def run_auto_round(row: Row, assets: Assets, ids: Any, meter: Meter) -> tuple[nn.Module, float]:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=getattr(torch, row.dtype))
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    tokens = {"dataset": list(torch.from_numpy(ids)[:, None]), "nsamples": len(ids), "seqlen": CONTEXT}
    grid = {"bits": row.bits, "group_size": GROUP_SIZE, "sym": row.symmetric}
    with meter:
        model, _ = AutoRound(model, tokenizer, iters=NUM_ROUNDS, device_map="cpu", **grid, **tokens).quantize()
    return model, bits_with_zero_point(row)


def run_tersor(row: Row, assets: Assets, ids: Any, meter: Meter) -> tuple[nn.Module, float]:
    import tersor
    from tersor.checkpoint.open import open_model

    model, task = open_model(str(assets.model)).model, open_protocol(assets)  # of the same tokens
    with meter:
        made = tersor.compress(model, tersor.Recipe.of(row.setting, exclude=[KEPT]), task)
    num_weights = sum(out * into for out, into in (site.shape for site in made.sites))
    return made.model.float(), 8 * sum(site.num_bytes for site in made.sites) / num_weights


TOOLS = {"llmcompressor": run_llmcompressor, "auto-round": run_auto_round, "tersor": run_tersor}


def bits_with_zero_point(row: Row) -> float:
    """Per weight in the layouts the peers export: codes, and for every group a 16-bit scale and a zero point."""
    return row.bits + (16 + row.bits) / GROUP_SIZE


def decoder_weights(model: nn.Module) -> dict[str, Tensor]:
    """The decoder's linear weights in float32, under their names in the checkpoint."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules() if ".layers." in name}
    return {
        f"{name}.weight": weight.detach().float().contiguous()
        for name, weight in weights.items()
        if weight is not None and weight.dim() == 2
    }


# In the process that compares.


def save_tokens(assets: Assets, folder: Path) -> None:
    """The calibration tokens `[window, position]`, for tools that draw theirs differently."""
    import numpy as np

    batches = open_protocol(assets).batches("calibration")
    np.save(folder / "tokens.npy", np.concatenate([batch.inputs["input_ids"].numpy() for batch in batches]))


def line(row: Row, report: dict[str, Any], assets: Assets, folder: Path) -> str:
    """A row of the table: the weights that the tool left, scored."""
    from safetensors.torch import load_file

    original, model = open_original(assets), open_original(assets)
    unknown = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False).unexpected_keys
    assert not unknown, unknown
    quality, costs = evaluate(model, original, open_protocol(assets)), report["costs"]
    return (
        f"| {row.name} | {report['bits']:.2f} | {quality.perplexity:.1f} | {quality.kl:.3f} | {costs['cpu']:.0f} "
        f"| {costs['wall']:.0f} | {costs['peak_rss'] / 1e6:.0f} | {costs['start_rss'] / 1e6:.0f} |"
    )


def page(lines: list[str], versions: dict[str, str]) -> str:
    from tersor.measure.scorecard import machine

    about, listing = machine(), "\n".join(lines)
    used = ", ".join(f"{package} {versions[package]}" for package in PACKAGES if package in versions)
    return f"""# tersor beside other tools, on SmolLM2-135M-Instruct

Command: `python benchmarks/peers.py --assets FOLDER --peer-python VENV/bin/python --write`

{used}; Python {about["python"]}, {about["processor"]} ({about["cpu_capability"]}), {NUM_THREADS} threads.

All linear weights of the decoder; embeddings and head stay as they are. Calibration: 32 windows of 512 tokens of
WikiText-2 valid. Perplexity and KL to the original (nats per token): first 8,192 tokens of WikiText-2 test, windows of
512, weights dequantized, float32, one evaluator for all. Bits per linear weight, scales and zero points counted.
Seconds are of the compression alone, without imports and loading the model: CPU seconds of all threads, then by the
clock. Peak memory is of the whole process; beside it, what lay in memory when compression began.
autoround makes {NUM_ROUNDS} rounds in auto-round, and tersor's default number in tersor.

| tool and setting | bits | perplexity | KL | CPU s | clock s | peak MB | MB at start |
|---|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
