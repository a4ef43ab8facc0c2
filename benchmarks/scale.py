"""A checkpoint larger than memory: its peak memory and its time per block when it is compressed block by block.

    python benchmarks/scale.py [--layers N] [--cap GIGABYTES] [--folder FOLDER] [--write] [-- COMMAND ...]

Writes a Llama-shaped checkpoint of random bf16 weights (3.2 B parameters, 6.4 GB) shard by shard into FOLDER (default:
the temporary folder), runs COMMAND under a hard cap on its address space (`ulimit -v`), and samples its memory.
`{model}`, `{text}` and `{output}` in COMMAND stand for the checkpoint, a text to calibrate on and a folder that does
not exist yet; a line of its output with `block I/N` marks the end of block I. Everything written is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from protocol import resident
from rows import child_environment

if TYPE_CHECKING:
    from torch import Generator, Tensor

COMMAND = [
    "tersor",
    "compress",
    "{model}",
    "-o",
    "{output}",
    "--stream",
    "--format",
    "gptq(upstream_correction=0):int4-g64",
]
COMMAND += ["--exclude", "*embed_tokens", "--task", "perplexity", "--data", "{text}"]
COMMAND += ["--task-option", "context=128", "--task-option", "calibration_examples=8"]
NUM_THREADS = 2
INTERVAL = 0.1  # seconds between samples of memory


@dataclass(frozen=True)
class Shape:
    """Of a Llama decoder with tied embeddings and head: narrow and deep, to see whether depth costs memory."""

    num_layers: int = 68
    hidden: int = 2048
    intermediate: int = 5632
    num_heads: int = 32
    num_key_value_heads: int = 8
    vocabulary: int = 32000

    def config(self) -> dict[str, object]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.hidden // self.num_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Names and shapes of the weights, the embedding first, then one shard a layer."""
        hidden, key_value = self.hidden, self.hidden // self.num_heads * self.num_key_value_heads
        yield {"model.embed_tokens.weight": (self.vocabulary, hidden), "model.norm.weight": (hidden,)}
        for layer in range(self.num_layers):
            shapes: dict[str, tuple[int, ...]] = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (key_value, hidden),
                "self_attn.v_proj": (key_value, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (self.intermediate, hidden),
                "mlp.up_proj": (self.intermediate, hidden),
                "mlp.down_proj": (hidden, self.intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }
            yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> int:
    """A Hugging Face folder with a tokenizer of bytes; one shard in memory at a time. Returns the parameters."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    num_shards, num_parameters, places = shape.num_layers + 1, 0, {}
    for index, shapes in enumerate(shape.shards()):
        file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        tensors = {name: random_weight(size, generator) for name, size in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        num_parameters += sum(tensor.numel() for tensor in tensors.values())
        places |= dict.fromkeys(tensors, file)
    index_content = {"metadata": {"total_size": 2 * num_parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_content, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    write_tokenizer(folder)
    return num_parameters


def random_weight(size: tuple[int, ...], generator: Generator) -> Tensor:
    """Matrices as at initialization, so that activations keep their scale; ones for norms. bf16."""
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    weight = torch.empty(size, dtype=torch.bfloat16)
    return weight.normal_(0, size[1] ** -0.5, generator=generator)


def write_tokenizer(folder: Path) -> None:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_text(path: Path, num_bytes: int) -> None:
    """Random lower-case words: what is read does not matter to a random model."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz     ", k=num_bytes)
    path.write_text("".join(letters))


@dataclass
class Run:
    """What was seen of a process.

    Attributes:
        peak: the most bytes it had resident.
        address_space: the most bytes of addresses it had in use.
        samples: (seconds since the start, bytes resident).
        blocks: seconds since the start at which each block was done.
        output: its last lines.
    """

    returncode: int = 0
    seconds: float = 0.0
    peak: int = 0
    address_space: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    output: list[str] = field(default_factory=list)

    def halves(self) -> Iterator[tuple[str, float, float]]:
        """For the first half of the blocks and for the second: seconds a block, and the most bytes resident."""
        middle = len(self.blocks) // 2
        for name, times in (("first", self.blocks[: middle + 1]), ("second", self.blocks[middle:])):
            if len(times) > 1:
                inside = [rss for at, rss in self.samples if times[0] <= at <= times[-1]]
                yield name, (times[-1] - times[0]) / (len(times) - 1), max(inside, default=0)


def watch(command: list[str], cap: int) -> Run:
    """Run a command whose address space is at most `cap` bytes."""
    run, start = Run(), time.perf_counter()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))

    process = subprocess.Popen(
        command,
        env=child_environment(NUM_THREADS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit,
    )

    def sample() -> None:
        while process.poll() is None:
            try:
                run.peak = max(run.peak, resident("VmHWM", process.pid))
                run.address_space = max(run.address_space, resident("VmPeak", process.pid))
                run.samples.append((time.perf_counter() - start, resident("VmRSS", process.pid)))
            except (OSError, ValueError):  # it has just ended
                return
            time.sleep(INTERVAL)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stdout is not None
    for text in process.stdout:
        if re.search(r"block \d+/\d+", text):
            run.blocks.append(time.perf_counter() - start)
        run.output = [*run.output, text.rstrip()][-20:]
    run.returncode = process.wait()
    run.seconds = time.perf_counter() - start
    sampler.join()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=Shape.num_layers)
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the command")
    parser.add_argument("--cap", type=float, default=4.0, help="GB of address space (4)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written and deleted again")
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/scale.md")
    parser.add_argument("command", nargs="*", default=COMMAND)
    args = parser.parse_args()
    shape = Shape(args.layers, 256, 512, 4, 2, 512) if args.tiny else Shape(args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        names = {name: str(Path(folder) / name) for name in ("model", "text", "output")}
        Path(names["model"]).mkdir()
        num_parameters = write_checkpoint(Path(names["model"]), shape)
        write_text(Path(names["text"]), 200_000)
        num_bytes = sum(path.stat().st_size for path in Path(names["model"]).glob("*.safetensors"))
        print(f"wrote {num_parameters / 1e9:.2f} B parameters, {num_bytes / 1e9:.2f} GB", flush=True)
        run = watch([part.format(**names) for part in args.command], int(args.cap * 1e9))
    lines = [
        f"| parameters | {num_parameters / 1e9:.2f} B in {shape.num_layers} blocks |",
        f"| checkpoint | {num_bytes / 1e9:.2f} GB |",
        f"| cap on the address space | {args.cap:.2f} GB |",
        f"| peak address space | {run.address_space / 1e9:.2f} GB |",
        f"| peak resident | {run.peak / 1e9:.2f} GB |",
        f"| seconds in all | {run.seconds:.0f} |",
        *(
            f"| {name} half: seconds a block, peak | {pace:.1f}, {peak / 1e9:.2f} GB |"
            for name, pace, peak in run.halves()
        ),
    ]
    print("\n".join(lines))
    if run.returncode:
        print(f"the command ended with {run.returncode}:", *run.output, sep="\n", file=sys.stderr)
        return 1
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(lines, args.command))
    return 0


def page(lines: list[str], command: list[str]) -> str:
    from tersor.measure.scorecard import machine

    about, listing = machine(), "\n".join(lines)
    return f"""# A checkpoint larger than memory

Command: `python benchmarks/scale.py --write`, which runs `{" ".join(command)}`

tersor {about["tersor"]}, torch {about["torch"]}, Python {about["python"]}, {about["processor"]}, {NUM_THREADS} threads.
A Llama decoder of random bf16 weights, compressed block by block under `ulimit -v`.

| | |
|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
