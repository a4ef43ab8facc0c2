"""QLoRA on SmolLM2-135M-Instruct and Shakespeare: does it learn, what does it take, and can it be merged.

    python benchmarks/qlora.py --assets FOLDER [--rows ROW ...] [--results FILE] [--work FOLDER] [--write]

The first 90 % of `text/shakespeare.txt` are trained on, the rest is held out. Each row runs in a process of its own and
is appended to FILE (JSON lines), so that a run that was stopped goes on where it was; `train` leaves the adapter in the
work folder, and the rows after it read it there. `--write` puts everything in FILE into benchmarks/qlora.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from protocol import resident
from rows import Results, run_rows

BASE = "nearest:nf4"  # as the paper has it
BATCH, CONTEXT, HELD_OUT, CALIBRATION = 4, 256, 16, 32
SETTINGS = {"rank": 16, "alpha": 32, "learning_rate": 1e-3, "batch_size": BATCH, "num_evaluations": 0}
MEMORY = {
    "full": {},
    "full, checkpointed": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "qlora": {"lora": True, "base": BASE},
    "qlora, checkpointed": {"lora": True, "base": BASE, "gradient_checkpointing": True},
}
ROWS = ["train", "reload", "merge float", "merge naive", "merge solved", *(f"memory {name}" for name in MEMORY)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"), metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", choices=ROWS, help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-qlora.jsonl")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tersor-qlora", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--examples", type=int, default=HELD_OUT, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = Path(args.assets or ".")
    for path in (root / "smollm2" / "config.json", root / "text" / "shakespeare.txt"):
        if not path.exists():
            raise SystemExit(f"needs {path}: give --assets FOLDER")
    if args.run:
        print(json.dumps({"row": args.run, **run(args.run, root, args)}))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.results)
    options = ["--assets", root, "--work", args.work, "--steps", args.steps, "--examples", args.examples]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    complete = run_rows(args.rows, results, options, num_threads=args.threads, environment=malloc)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


def run(row: str, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    start = time.process_time()
    kind, _, name = row.partition(" ")
    task = open_text(root, args)
    if kind == "memory":
        found = memory(root, task, MEMORY[name])
    else:
        work = {"train": train, "reload": reload, "merge": merge}[kind]
        found = work(root, task, args, *([name] if name else []))
    return found | {"cpu": time.process_time() - start}


def open_text(root: Path, args: argparse.Namespace) -> Any:
    """Shakespeare as a task: 90 % to train and calibrate on, the rest held out."""
    from transformers import AutoTokenizer

    import tersor

    text = (root / "text" / "shakespeare.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) * 9 // 10)
    (args.work / "train.txt").write_text(text[:cut], encoding="utf-8")
    (args.work / "held-out.txt").write_text(text[cut:], encoding="utf-8")
    return tersor.open_task(
        "perplexity",
        args.work / "held-out.txt",
        train=args.work / "train.txt",
        tokenizer=AutoTokenizer.from_pretrained(root / "smollm2"),
        options={"context": CONTEXT, "max_examples": args.examples, "calibration_examples": CALIBRATION},
    )


def original(root: Path) -> Any:
    """The model in float32."""
    from tersor.checkpoint.open import open_model

    return open_model(str(root / "smollm2")).model.float()


def loss(task: Any, model: Any) -> float:
    """Held-out nats per token."""
    import math

    return math.log(task.score(model).value)


def memory(root: Path, task: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Two training steps: the most the process had resident, less what it had before the model came, and what was
    predicted."""
    import torch

    from tersor.analysis.training_memory import training_memory
    from tersor.measure.memory import RESET, return_free_memory
    from tersor.training import FinetuneStep, LoraStep
    from tersor.training.finetune import task_loss
    from tersor.training.loop import train as run_training
    from tersor.training.lora import adapt

    settings = {"num_steps": 2, "batch_size": BATCH, "num_evaluations": 0, "learning_rate": 1e-5}
    fields = dict(fields)
    lora = fields.pop("lora", False)
    step = LoraStep(rank=16, **settings, **fields) if lora else FinetuneStep(**settings, **fields)
    warm_up(task, settings)
    return_free_memory()
    before = resident("VmRSS")
    model = original(root)
    predicted = training_memory(model, task, step)
    if isinstance(step, LoraStep):
        adapt(model, step, task)
    return_free_memory()
    RESET.write_text("5")
    torch.manual_seed(0)
    start = time.perf_counter()
    run_training(model, task, task_loss(task), step)
    seconds = time.perf_counter() - start
    return {"measured": resident("VmHWM") - before, "predicted": predicted.to_dict(), "seconds": seconds / 2}


def warm_up(task: Any, settings: dict[str, Any]) -> None:
    """Import and set up what is needed on first use, on a model of two narrow layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tersor.training import LoraStep
    from tersor.training.job import Job
    from tersor.training.lora import train_adapter

    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **narrow))
    train_adapter(Job(model, model, task), LoraStep(**{**settings, "batch_size": 1, "num_steps": 1}, base=BASE))


def train(root: Path, task: Any, args: argparse.Namespace) -> dict[str, Any]:
    """QLoRA on the packed base; the adapter goes to the work folder."""
    from tersor.checkpoint.adapters import save_adapter
    from tersor.training import LoraStep
    from tersor.training.job import Job
    from tersor.training.lora import train_adapter

    model = original(root)
    float_loss = loss(task, model)
    step = LoraStep(**SETTINGS, base=BASE, num_steps=args.steps)
    start = time.process_time()
    adapted, curve = train_adapter(Job(model, model, task), step)
    cpu = time.process_time() - start
    with adapted.peft.disable_adapter():
        base_loss = loss(task, model)
    after = loss(task, model)
    adapter = adapted.adapter
    save_adapter(adapter, args.work / "adapter", "smollm2")
    num_bytes = sum(path.stat().st_size for path in (args.work / "adapter").iterdir())
    return {
        "float": float_loss,
        "base": base_loss,
        "after": after,
        "train_cpu": cpu,
        "num_steps": args.steps,
        "first": curve.losses[0],
        "last": sum(curve.losses[-5:]) / len(curve.losses[-5:]),
        "adapter_bytes": num_bytes,
        "num_trained": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "description": task.description,
    }


def packed_base(root: Path) -> Any:
    """The base that `train` packed, made again: nothing of it depends on data."""
    from tersor.training import LoraStep
    from tersor.training.lora import pack_base

    model = original(root)
    pack_base(model, LoraStep(base=BASE), None, 0, lambda *_: None)
    return model


def reload(root: Path, task: Any, args: argparse.Namespace) -> dict[str, Any]:
    """transformers and peft alone, on the base's decoded weights, and on the float base."""
    from peft import PeftModel

    packed, losses = packed_base(root), {}
    for name in ("decoded", "float"):
        model = original(root)
        if name == "decoded":
            for path, module in packed.named_modules():
                if hasattr(module, "packed"):
                    model.get_submodule(path).weight.data = module.weight
        losses[name] = loss(task, PeftModel.from_pretrained(model, args.work / "adapter"))
    return losses


def merge(root: Path, task: Any, args: argparse.Namespace, into: str) -> dict[str, Any]:
    """Held-out loss of a merged model, and its KL divergence from the same base with the adapter beside it."""
    from tersor.checkpoint.adapters import load_adapter
    from tersor.training.merge import divergences, naive, resolving, unmerged
    from tersor.training.merge import merge as merged_into

    adapter = load_adapter(args.work / "adapter")
    base = original(root) if into == "float" else packed_base(root)
    start = time.process_time()
    merged = merged_into(base, adapter, task, method=naive if into == "naive" else resolving)
    cpu = time.process_time() - start
    found = divergences(unmerged(base, adapter), {"merged": merged, "base": base}, task)
    return {"loss": loss(task, merged), "kl": found["merged"], "kl_base": found["base"], "merge_cpu": cpu}


def page(done: dict[str, dict[str, Any]]) -> str:
    import importlib.metadata

    from tersor.measure.scorecard import machine

    about, trained, again = machine(), done["train"], done["reload"]
    merges = {
        "nothing: the base without the adapter": ("merge solved", "kl_base", None),
        "float base, added": ("merge float", "kl", "loss"),
        f"{BASE} base, decoded, added, rounded to nearest": ("merge naive", "kl", "loss"),
        f"{BASE} base, re-solved": ("merge solved", "kl", "loss"),
    }
    merge_lines = "\n".join(
        merge_line(title, done[row][kl], done[row]["loss"] if nats else trained["base"], done[row])
        for title, (row, kl, nats) in merges.items()
        if row in done
    )
    memory_lines = "\n".join(memory_line(name, done[f"memory {name}"]) for name in MEMORY if f"memory {name}" in done)
    peft = importlib.metadata.version("peft")
    return f"""# QLoRA on SmolLM2-135M-Instruct

Command: `python benchmarks/qlora.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, peft {peft}, Python
{about["python"]}; {about["processor"]} ({about["cpu_capability"]}), one thread. Computed in float32.

Text: the first 90 % of Shakespeare's collected text to train on ({trained["description"]}). Base: the linear layers of
all blocks as `{BASE}`, embeddings and head kept. Adapters: rank {SETTINGS["rank"]}, alpha {SETTINGS["alpha"]} at all of
them, {trained["num_trained"]:,} numbers, {trained["adapter_bytes"] / 1e6:.1f} MB. {trained["num_steps"]} steps of
{BATCH} windows, learning rate {SETTINGS["learning_rate"]}; {trained["train_cpu"]:.0f} CPU seconds.

## Held-out loss, nats per token

| model | loss |
|---|---|
| float original | {trained["float"]:.3f} |
| `{BASE}` base | {trained["base"]:.3f} |
| `{BASE}` base with the trained adapter | {trained["after"]:.3f} |
| the adapter read by plain peft, on the base's decoded weights | {again["decoded"]:.3f} |
| the adapter read by plain peft, on the float original | {again["float"]:.3f} |

The adapter's own process and plain peft differ by {abs(again["decoded"] - trained["after"]):.1e} nats.

## Merged

KL divergence on the held-out windows, in nats per token, from the same base with the adapter beside its weights.

| into | KL | held-out loss | CPU s |
|---|---|---|---|
{merge_lines}

## Memory of a training step

{BATCH} windows of {CONTEXT} tokens, AdamW, MB. Measured: the most the process had resident in two steps, less what it
had before the model was loaded. Predicted: `tersor inspect --training-memory`, the peak and the copy of the last good
weights; the columns before it are its parts (activations: what is kept between forward and backward pass).

| training | weights | gradients | optimizer | activations | predicted | measured | off | s/step |
|---|---|---|---|---|---|---|---|---|
{memory_lines}
"""


def merge_line(title: str, kl: float, nats: float, result: dict[str, Any]) -> str:
    cpu = "" if title.startswith("nothing") else f"{result['merge_cpu']:.0f}"
    return f"| {title} | {kl:.4f} | {nats:.3f} | {cpu} |"


def memory_line(name: str, result: dict[str, Any]) -> str:
    found = result["predicted"]
    parts = " | ".join(f"{found[part] / 1e6:.0f}" for part in ("weights", "gradients", "optimizer", "activations"))
    predicted = found["peak"] + found["copies"]
    off = predicted / result["measured"] - 1
    return (
        f"| {name} | {parts} | {predicted / 1e6:.0f} | {result['measured'] / 1e6:.0f} | {off:+.1%} "
        f"| {result['seconds']:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
