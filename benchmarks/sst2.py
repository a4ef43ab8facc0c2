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
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import Meter, child_environment, last_line

TOLERANCE = "0.02"  # two points of accuracy
MAX_LENGTH = 64
NUM_COPIES = 4  # variants of every sentence, for distillation
FINETUNE = {"epochs": 3, "learning_rate": 1e-4, "batch_size": 32, "precision": "bf16"}
DISTIL = {"batch_size": 64, "precision": "bf16", "cache": True}
STUDENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # how it is cut, and taught
    "3 layers": ({"layers": 3}, {"epochs": 3, "learning_rate": 3e-4}),
    "3 layers, 3/4 width": ({"layers": 3, "width": 0.75}, {"epochs": 4, "learning_rate": 5e-4}),
}


@dataclass(frozen=True)
class Packing:
    """Schemes of a weights step: of the linear layers, and of the embeddings."""

    scheme: str
    embeddings: str

    @property
    def rules(self) -> dict[str, str]:
        return {"*embeddings*": "int8", "*word_embeddings": self.embeddings}


PACKINGS = {
    "fp32": None,
    "int8-dynamic, embeddings int8": Packing("int8-dynamic", "int8"),
    "int8-dynamic, embeddings int4-g32": Packing("int8-dynamic", "int4-g32"),
    "int8-dynamic, embeddings int3-g32": Packing("int8-dynamic", "int3-g32"),
}
ROWS = [
    *(f"teacher | {packing}" for packing in ("fp32", "int8-dynamic, embeddings int8")),
    *(f"{student} | {packing}" for student in STUDENTS for packing in PACKINGS),
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
        print(json.dumps(train(args.run, place) if args.run in ("teacher", *STUDENTS) else measure(args.run, place)))
        return 0
    place.work.mkdir(parents=True, exist_ok=True)
    results = args.results or place.work / "results.jsonl"
    done = {r["row"]: r for r in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    models = dict.fromkeys(["teacher", *(row.split(" | ")[0] for row in args.rows)])
    for row in [*models, *args.rows]:
        if row in done:
            continue
        command = [sys.executable, __file__, "--assets", str(place.assets), "--work", str(place.work), "--run", row]
        command += ["--steps", str(args.steps)] if args.steps else []
        child = subprocess.run(command, env=child_environment(args.threads), capture_output=True)
        if child.returncode:
            print(f"{row}: {last_line(child.stderr)}", file=sys.stderr, flush=True)
            return 1
        done[row] = json.loads(child.stdout.splitlines()[-1]) | {"row": row}
        with results.open("a") as file:
            file.write(json.dumps(done[row]) + "\n")
        print(json.dumps(done[row]) if row in models else line(done[row]), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(done))
    return 0


# Training.


def train(model: str, place: Place) -> dict[str, Any]:
    """Fine-tune the teacher, or cut and distil a student, into a Hugging Face folder of its own."""
    import tersor

    folder = place.folder(model)
    limit = {"num_steps": place.num_steps} if place.num_steps else {}
    if model == "teacher":
        source, data, steps = classifier(place), place.train, [{"step": "finetune", **FINETUNE, **limit}]
    else:
        source, data = place.folder("teacher"), place.work / "unlabelled.txt"
        if not data.exists():
            data.write_text("\n".join(variants(place)) + "\n")
        cut, taught = STUDENTS[model]
        steps = [{"step": "student", **cut}, {"step": "distil", **DISTIL, **taught, **limit}]
    recipe = tersor.Recipe.validated({"steps": steps}, model)
    loaded, task = opened(source, place, data)
    with Meter() as meter:
        made = tersor.compress(loaded, recipe, task, journal=place.work / "journal")
    made.model.save_pretrained(folder)
    tokenizer_of(source).save_pretrained(folder)
    return {
        "examples": task.num_train,
        "steps": made.curves[0].num_steps,
        "accuracy": task.score(made.model).value,
        "parameters": made.model.num_parameters(),
        **meter.costs.to_dict(),
    }


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
    from tersor.checkpoint.source import open_model
    from tersor.workflow import TaskChoice, open_task_for

    source = open_model(str(folder))
    choice = TaskChoice("classification", place.dev, train=data, options={"max_length": MAX_LENGTH})
    return source.model, open_task_for(source, choice)


def variants(place: Place) -> list[str]:
    """The train sentences without their labels, and of each some copies: words put in the place of others that are near
    in the teacher's embeddings, left out, or cut off (Jiao et al. 2019, https://arxiv.org/abs/1909.10351)."""
    import numpy as np

    rng = np.random.default_rng(0)
    with place.train.open(newline="") as file:
        rows = list(csv.DictReader(file))[: 200 if place.num_steps else None]
    sentences = [" ".join(row["sentence"].split()) for row in rows]
    near = neighbours({word for sentence in sentences for word in sentence.lower().split()}, place)
    found = dict.fromkeys(sentences)
    for sentence in sentences:
        for _ in range(NUM_COPIES):
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
    from tersor.workflow import TaskChoice, compare_models

    model, packing = row.split(" | ")
    folder, schemes = place.folder(model), PACKINGS[packing]
    if schemes is not None:
        loaded, task = opened(folder, place)
        recipe = tersor.Recipe.of(schemes.scheme, schemes.rules)
        made = tersor.compress(loaded, recipe, task)
        artifact = place.folder(f"{model} {packing}")
        tersor.save(made.model, artifact, source=folder)
        folder = artifact
    cards, description, verdicts = compare_models(
        [str(place.folder("teacher")), str(folder)],
        task_choice=TaskChoice("classification", place.dev, options={"max_length": MAX_LENGTH}),
        drop=TOLERANCE,
    )
    teacher, card = (card.to_dict() for card in cards)
    return {
        "bytes": card["file_bytes"],
        "ratio": teacher["file_bytes"] / card["file_bytes"],
        "parameters": card["num_parameters"],
        "accuracy": card["score"],
        "interval": card["score_interval"],
        "verdict": verdicts[0].to_dict(),
        "latency": card["latency"],
        "task": description,
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
        f"| {model} | {done[model]['parameters'] / 1e6:.2f} M | {done[model]['examples']:,} | {done[model]['steps']:,} "
        f"| {100 * done[model]['accuracy']:.1f} | {done[model]['cpu']:.0f} |"
        for model in ("teacher", *STUDENTS)
        if model in done
    )
    listing = "\n".join(map(line, rows))
    return f"""# SST-2: fine-tune, distil, quantize

Command: `python benchmarks/sst2.py --assets FOLDER --work FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread, on a machine that others used too.

The teacher is all-MiniLM-L6-v2 with a head of two classes, fine-tuned on the labelled train sentences. Students are cut
from it (`step: student`) and taught by it (`step: distil`, kd, T = 2, teacher cached) without any label, on the same
sentences and {NUM_COPIES} variants of each, in which words are replaced by near ones, left out or cut off. Everything
is trained in bf16, about 2.5 times as fast here as float32. CPU seconds include the teacher's run over the train split.

| model | parameters | train sentences | steps | accuracy | CPU s |
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
