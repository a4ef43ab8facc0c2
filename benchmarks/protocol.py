"""What the benchmarks on SmolLM2-135M-Instruct share: the tokens, the scores, and what a process cost.

Calibration: 32 windows of 512 tokens of WikiText-2 valid, their starts drawn without replacement (NumPy's generator,
seed 0). Evaluation: the first 8,192 tokens of WikiText-2 test in 16 windows, in each the mean negative log-likelihood
of the 511 predicted tokens; computed in float32. FOLDER, given by `--assets` or TERSOR_ASSETS, holds `smollm2/` (a
Hugging Face folder), `text/wikitext2-valid.txt` and `text/wikitext2-test-head.txt`.

tersor and torch are imported inside functions: a peer's environment has no tersor, and a process that only starts
others and reads their results stays small.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from tersor.tasks import Task

NUM_WINDOWS, CONTEXT, NUM_TOKENS = 32, 512, 8192
KEPT = "*embed_tokens"  # tied to the head: embeddings and head stay as they are


@dataclass(frozen=True)
class Assets:
    """Where the model and the texts lie."""

    root: Path
    model: Path
    calibration: Path
    evaluation: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> Assets:
        """Exits with a message that names the file that is missing."""
        root = Path(args.assets or ".")
        text = root / "text"
        model = Path(args.model or root / "smollm2")
        found = cls(root, model, text / "wikitext2-valid.txt", text / "wikitext2-test-head.txt")
        for path in (found.model / "config.json", found.calibration, found.evaluation):
            if not path.exists():
                raise SystemExit(f"needs {path}: give --assets FOLDER, and --model FOLDER if the model lies elsewhere")
        return found

    @property
    def options(self) -> list[str]:
        """The command-line options that name them."""
        return ["--assets", str(self.root), "--model", str(self.model)]


def add_asset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS"), metavar="FOLDER")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: smollm2 in the assets folder")


def open_protocol(assets: Assets) -> Task:
    """The tokens, as a task: its calibration split is what every tool is given."""
    from transformers import AutoTokenizer

    import tersor

    return tersor.open_task(
        "perplexity",
        assets.evaluation,
        calibration=assets.calibration,
        tokenizer=AutoTokenizer.from_pretrained(assets.model),
        options={"context": CONTEXT, "max_tokens": NUM_TOKENS, "calibration_examples": NUM_WINDOWS},
    )


def open_original(assets: Assets) -> nn.Module:
    """The model in float32 and eval mode."""
    from tersor.checkpoint.open import open_model

    return open_model(str(assets.model)).model.float()


@dataclass(frozen=True)
class Quality:
    """`kl`: mean KL divergence from the original model's predictions, nats per predicted token."""

    perplexity: float
    kl: float


def evaluate(model: nn.Module, original: nn.Module, task: Task) -> Quality:
    """Both models in eval mode, run on the evaluation windows, two at a time."""
    import torch

    from tersor.tasks.fidelity import kl_divergence
    from tersor.tasks.perplexity import window_nll

    nats, divergence, count = 0.0, 0.0, 0
    with torch.inference_mode():
        for batch in task.batches("eval", 2):
            outputs = task.forward(original, batch), task.forward(model, batch)
            for p, q, ids in zip(*outputs, batch.inputs["input_ids"], strict=True):
                nats += window_nll(q, ids, 1)[0]
                divergence += kl_divergence(p[:-1], q[:-1])
                count += len(ids) - 1
    return Quality(math.exp(nats / count), divergence / count)


@dataclass(frozen=True)
class Costs:
    """Of a stretch of work in this process: CPU seconds of all threads, seconds by the clock, and bytes: the most that
    the process had resident since it started, and what it had when the work began."""

    cpu: float
    wall: float
    peak_rss: int
    start_rss: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Meter:
    """`with Meter() as meter: work()`, then `meter.costs`."""

    costs: Costs

    def __enter__(self) -> Meter:
        self.start = time.process_time(), time.perf_counter(), resident("VmRSS")
        return self

    def __exit__(self, *problem: object) -> None:
        cpu, wall, rss = self.start
        self.costs = Costs(time.process_time() - cpu, time.perf_counter() - wall, resident("VmHWM"), rss)


def resident(field: str, process: int | str = "self") -> int:
    """A field of /proc/PROCESS/status in bytes. VmHWM, unlike ru_maxrss, does not count the parent before exec.

    Raises OSError or ValueError for a process that has ended.
    """
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    if not match:
        raise ValueError(f"/proc/{process}/status has no {field}")
    return int(match[1]) * 1024
