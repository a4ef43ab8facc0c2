"""Distil, then quantize: all-MiniLM-L6-v2 fine-tuned on SST-2, students cut from it, and their packed artifacts.

    python benchmarks/sst2.py --assets FOLDER --work FOLDER [--rows ROW ...] [--results FILE] [--write]

The assets hold `minilm/` (a Hugging Face folder), `text/sst2-train.csv` and `text/sst2-dev.csv`. The work folder keeps
the fine-tuned teacher, the students and the training journals. A row is a model, or a model and what packs it; each
runs in a process of its own and is appended to FILE (JSON lines), so that a run that was stopped goes on where it was.
`--write` puts everything in FILE into benchmarks/sst2.md. `--steps N` trains all for N steps only, to try it out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import Meter
from rows import Results, run_rows

TOLERANCE = "0.02"  # two points of accuracy
MAX_LENGTH = 64
BF16 = {"precision": "bf16"}


@dataclass(frozen=True)
class Stage:
    """A model: what it starts from, the sentences it is trained on, and how. Whatever is no teacher imitates it.

    Attributes:
        num_copies, num_others: of the train sentences without labels: variants of each, and sentences of other texts; 0
            copies: the train sentences with their labels.
    """

    start: str
    steps: tuple[dict[str, Any], ...]
    num_copies: int = 0
    num_others: int = 0
    seed: int = 0


QAT = {
    "step": "qat",
    "scheme": "int8-dynamic",
    "rules": {"*embeddings*": "int8", "*word_embeddings": "int2-g64"},
    "epochs": 1,
    "learning_rate": 1e-4,
    "batch_size": 64,
    **BF16,
}
STAGES = {
    "teacher": Stage("", ({"step": "finetune", "epochs": 3, "learning_rate": 1e-4, "batch_size": 32, **BF16},)),
    "3 layers": Stage(
        "teacher",
        (
            {"step": "student", "layers": 3},
            {"step": "distil", "epochs": 3, "learning_rate": 3e-4, "batch_size": 64, "cache": True, **BF16},
        ),
        num_copies=4,
    ),
    "2 layers": Stage(
        "3 layers",
        (
            {"step": "student", "layers": [0, 2]},
            {"step": "distil", "epochs": 1, "learning_rate": 3e-4, "batch_size": 64, "cache": True, **BF16},
        ),
        num_copies=2,
        num_others=12_000,
        seed=1,
    ),
    "3 layers, qat": Stage("3 layers", (QAT,), num_copies=2, num_others=12_000, seed=1),
    "2 layers, qat": Stage("2 layers", (QAT | {"epochs": 2},), num_copies=2, num_others=12_000, seed=2),
}
PACKINGS = {  # of the linear layers, and of the word embeddings
    "fp32": None,
    "int8-dynamic, embeddings int8": ("int8-dynamic", "int8"),
    "int8-dynamic, embeddings int4-g32": ("int8-dynamic", "int4-g32"),
    "int8-dynamic, embeddings int2-g32": ("int8-dynamic", "int2-g32"),
    "int8-dynamic, embeddings int2-g64": ("int8-dynamic", "int2-g64"),
}
ROWS = [
    *(f"teacher | {packing}" for packing in ("fp32", "int8-dynamic, embeddings int8")),
    *(f"3 layers | {packing}" for packing in PACKINGS),
    "3 layers, qat | int8-dynamic, embeddings int2-g64",
    *(f"2 layers | int8-dynamic, embeddings {embeddings}" for embeddings in ("int4-g32", "int2-g32")),
    "2 layers, qat | int8-dynamic, embeddings int2-g64",
]


@dataclass(frozen=True)
class Place:
    """Where things lie, and how long to train (None: as written above)."""

    assets: Path
    work: Path
    num_steps: int | None = None

    @property
    def train(self) -> Path:
        return self.assets / "text" / "sst2-train.csv"

    @property
    def dev(self) -> Path:
        return self.assets / "text" / "sst2-dev.csv"

    def folder(self, model: str) -> Path:
        return self.work / model.replace(" ", "-").replace(",", "").replace("/", "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."), metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: results.jsonl in the work folder")
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    place = Place(args.assets, args.work, args.steps)
    for path in (place.assets / "minilm" / "config.json", place.train, place.dev):
        if not path.exists():
            raise SystemExit(f"needs {path}: give --assets FOLDER")
    if args.run:
        print(json.dumps(train(args.run, place) if args.run in STAGES else measure(args.run, place)))
        return 0
    place.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.results or place.work / "results.jsonl")
    needed = {row.split(" | ")[0] for row in args.rows}
    models = [
        name for name in STAGES if {name, *(s for s in needed if STAGES[s].start == name)} & needed or name == "teacher"
    ]
    options = ["--assets", place.assets, "--work", place.work, *(["--steps", args.steps] if args.steps else [])]
    complete = run_rows(models, results, options, num_threads=args.threads)
    complete = complete and run_rows(args.rows, results, options, show=line, num_threads=args.threads)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


# Training.


def train(name: str, place: Place) -> dict[str, Any]:
    """Run a stage, and save what it makes: a Hugging Face folder, or an artifact where it packs."""
    import tersor
    from tersor.checkpoint.layout import packed_sites
    from tersor.training import Job
    from tersor.training.journal import Journal

    stage = STAGES[name]
    limit = {"num_steps": place.num_steps} if place.num_steps else {}
    steps = [step if step["step"] == "student" else {**step, **limit} for step in stage.steps]
    if stage.start:
        steps = [
            {**step, "teacher": str(place.folder("teacher"))} if step["step"] == "distil" else step for step in steps
        ]
    source = place.folder(stage.start) if stage.start else classifier(place)
    model, task = opened(source, place, sentences(stage, place))
    teacher = opened(place.folder("teacher"), place)[0] if stage.start else model
    recipe = tersor.Recipe.validated({"steps": steps}, name)
    job = Job(
        model, teacher, task, journal=Journal(place.folder(name + " journal") / "step.safetensors", recipe.to_yaml())
    )
    with Meter() as meter:
        for step in recipe.steps:
            step.run(job)
    folder = place.folder(name)
    if packed_sites(job.model):
        tersor.save(job.model, folder, source=source)
    else:
        job.model.save_pretrained(folder)
        tokenizer_of(source).save_pretrained(folder)
    return {
        "examples": task.num_train,
        "steps": job.curves[0].num_steps,
        "accuracy": task.score(job.model).value,
        **meter.costs.to_dict(),
    }


def sentences(stage: Stage, place: Place) -> Path:
    """The file that a stage is trained on."""
    if not stage.num_copies:
        return place.train
    path = place.work / f"sentences-{stage.num_copies}-{stage.num_others}-{stage.seed}.txt"
    if not path.exists():
        path.write_text("\n".join([*variants(stage, place), *others(stage, place)]) + "\n")
    return path


def others(stage: Stage, place: Place) -> list[str]:
    """Sentences of 5 to 40 words of C4 and WikiText-2 valid, drawn at random."""
    import numpy as np

    texts = [(place.assets / "text" / name).read_text() for name in ("c4-sample.txt", "wikitext2-valid.txt")]
    pieces = [" ".join(piece.split()) for text in texts for piece in re.split(r"(?<=[.!?])\s+|\n", text)]
    fitting = [piece for piece in dict.fromkeys(pieces) if 5 <= len(piece.split()) <= 40]
    chosen = np.random.default_rng(stage.seed).permutation(len(fitting))[: stage.num_others]
    return [fitting[place] for place in chosen]


def classifier(place: Place) -> Path:
    """The sentence encoder with a new head of two classes."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = place.work / "untrained"
    torch.manual_seed(0)
    names = {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(
        place.assets / "minilm", num_labels=2, id2label=names, label2id={name: number for number, name in names.items()}
    )
    model.save_pretrained(folder)
    tokenizer_of(place.assets / "minilm").save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def opened(folder: Path, place: Place, data: Path | None = None) -> tuple[Any, Any]:
    """A model and the task."""
    from tersor.checkpoint.open import open_model
    from tersor.tasks.data import Data

    source = open_model(str(folder))
    choice = Data("classification", place.dev, train=data, options={"max_length": MAX_LENGTH})
    return source.model, choice.open(source)


def variants(stage: Stage, place: Place) -> list[str]:
    """The train sentences without their labels, and of each some copies: words put in the place of others that are near
    in the teacher's embeddings, left out, or cut off (Jiao et al. 2019, https://arxiv.org/abs/1909.10351)."""
    import numpy as np

    rng = np.random.default_rng(stage.seed)
    with place.train.open(newline="") as file:
        rows = list(csv.DictReader(file))[: 200 if place.num_steps else None]
    originals = [" ".join(row["sentence"].split()) for row in rows]
    near = neighbours({word for sentence in originals for word in sentence.lower().split()}, place)
    found = dict.fromkeys(originals)
    for sentence in originals:
        for _ in range(stage.num_copies):
            words = []
            for word in sentence.split():
                draw, others = rng.random(), near.get(word.lower(), [])
                if draw < 0.25 and others:
                    words.append(others[rng.integers(len(others))])
                elif draw < 0.25 or draw >= 0.30:
                    words.append(word)
            if rng.random() < 0.25 and len(words) > 6:
                start = rng.integers(0, len(words) // 2)
                words = words[start : rng.integers(start + 4, len(words) + 1)]
            if words:
                found[" ".join(words)] = None
    return list(found)


def neighbours(words: set[str], place: Place, num: int = 8) -> dict[str, list[str]]:
    """The words of one token that are nearest by the cosine of the teacher's embeddings."""
    from torch.nn.functional import normalize

    model, tokenizer = opened(place.folder("teacher"), place)[0], tokenizer_of(place.folder("teacher"))
    vocabulary = {token: number for token, number in sorted(tokenizer.get_vocab().items()) if token.isalpha()}
    table = normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    tokens, known = list(vocabulary), sorted(words & set(vocabulary))
    candidates = table[list(vocabulary.values())]
    near = {}
    for word in known:
        order = (candidates @ table[vocabulary[word]]).topk(num + 1).indices.tolist()
        near[word] = [tokens[place] for place in order if tokens[place] != word][:num]
    return near


# Measuring.


def measure(row: str, place: Place) -> dict[str, Any]:
    """Pack a model, save and load it, and measure it beside the fp32 teacher."""
    import tersor
    from tersor.measure.scorecard import machine

    model, packing = row.split(" | ")
    folder, schemes = place.folder(model), PACKINGS[packing]
    if schemes is not None and not (folder / "tersor.json").exists():
        loaded, task = opened(folder, place, place.train)
        recipe = tersor.Recipe.of(schemes[0], {"*embeddings*": "int8", "*word_embeddings": schemes[1]})
        made = tersor.compress(loaded, recipe, task)
        artifact = place.folder(f"{model} {packing}")
        tersor.save(made.model, artifact, source=folder)
        folder = artifact
    found = tersor.compare(
        place.folder("teacher"),
        folder,
        task="classification",
        data=place.dev,
        train=place.train,
        options={"max_length": MAX_LENGTH},
        drop=TOLERANCE,
    )
    teacher, card = (card.to_dict() for card in found.scorecards)
    return {
        "bytes": card["file_bytes"],
        "ratio": teacher["file_bytes"] / card["file_bytes"],
        "parameters": card["num_parameters"],
        "accuracy": card["score"],
        "interval": card["score_interval"],
        "verdict": found.verdicts[0].to_dict(),
        "latency": card["latency"],
        "task": found.task,
        "machine": machine(),
    }


def line(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    (low, high), (least, most) = result["interval"], verdict["drop_interval"]
    speeds = " | ".join(
        f"{latency['p50']:.1f} | {latency['speedup']:.2f} [{latency['speedup_interval'][0]:.2f}, "
        f"{latency['speedup_interval'][1]:.2f}]"
        for latency in result["latency"]
    )
    return (
        f"| {result['row'].replace(' | ', '; ')} | {result['bytes'] / 1e6:.2f} | {result['ratio']:.1f} "
        f"| {100 * result['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] "
        f"| {100 * verdict['drop']:+.1f} [{100 * least:+.1f}, {100 * most:+.1f}] {verdict['outcome']} | {speeds} |"
    )


def page(done: dict[str, dict[str, Any]]) -> str:
    rows = [done[row] for row in ROWS if row in done]
    about = rows[-1]["machine"]
    trained = "\n".join(
        f"| {name} | {stage.start or 'all-MiniLM-L6-v2'} | {done[name]['examples']:,} | {done[name]['steps']:,} "
        f"| {100 * done[name]['accuracy']:.1f} | {done[name]['cpu']:.0f} |"
        for name, stage in STAGES.items()
        if name in done
    )
    listing = "\n".join(map(line, rows))
    return f"""# SST-2: fine-tune, distil, quantize

Command: `python benchmarks/sst2.py --assets FOLDER --work FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread, on a machine that others used too.

The teacher is all-MiniLM-L6-v2 with a head of two classes, fine-tuned on the labelled train sentences. The students are
cut (`step: student`) and taught by it (`step: distil`, kd, T = 2, teacher cached) without any label: the first on the
same sentences and {STAGES["3 layers"].num_copies} variants of each, in which words are replaced by near ones, left out
or cut off; the second is cut from the first, and taught on {STAGES["2 layers"].num_copies} other variants and
{STAGES["2 layers"].num_others:,} sentences of C4 and WikiText-2 valid. `qat` trains each of them on as many again,
already in the formats it is packed in. Training is in bf16, about 2.5 times as fast here as float32; CPU seconds
include the teacher's run over the train split.

| model | cut from | train sentences | steps | accuracy | CPU s |
|---|---|---|---|---|---|
{trained}

Sizes are of the whole weights file, embeddings included; ratio and speed are against the fp32 teacher, timed in turn
with the row at batch 1 and 32. Accuracy is over the 872 dev sentences with its 95 % interval; the drop is the paired
loss of accuracy in points with its 90 % interval, judged at 2 points.

| model | MB | ratio | accuracy | drop, verdict | ms, batch 1 | speed, batch 1 | ms, batch 32 | speed, batch 32 |
|---|---|---|---|---|---|---|---|---|
{listing}
"""


if __name__ == "__main__":
    sys.exit(main())
