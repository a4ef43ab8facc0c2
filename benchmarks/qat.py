"""Training with quantized weights and inputs against packing alone, and scales tuned after packing.

    python benchmarks/qat.py --assets FOLDER [--rows ROW ...] [--results FILE] [--write]

ResNet-20 on CIFAR-10 with 4-bit and with 3-bit weights and inputs, all-MiniLM-L6-v2 with 4-bit weights and 8-bit
inputs, SmolLM2-135M-Instruct with 3-bit weights. Each row runs in a process of its own and is appended to FILE (JSON
lines), so that a run that was stopped goes on where it was; `--write` puts everything in FILE into benchmarks/qat.md.
`--share 0.02` trains for that share of the steps, to see that everything runs. FOLDER (or TERSOR_ASSETS) holds what
models.py and protocol.py name, and `minilm/`, `text/stsb-dev.csv` and `text/c4-sample.txt`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protocol import KEPT, Assets, Meter, add_asset_options, evaluate
from rows import Results, run_rows

NUM_SENTENCES = 512  # whose embeddings are compared with the original's
ENDS = {"conv1": "int8/int8-static", "linear": "int8/int8-static"}  # first and last layer of the ResNet
IMAGES = {"step": "qat", "batch_size": 128, "learning_rate": 1e-3, "temperature": 4.0, "precision": "bf16"}
TEXTS = {"step": "qat", "batch_size": 16, "learning_rate": 1e-4, "scale_learning_rate": 1e-3, "num_steps": 120}
SCALES = {"step": "tune-scales", "num_steps": 48, "batch_size": 1, "learning_rate": 2e-3, "precision": "bf16"}


def weights(scheme: str, **fields: Any) -> dict[str, Any]:
    return {"step": "weights", "scheme": scheme, **fields}


RESNET: dict[str, list[dict[str, Any]]] = {
    "ResNet-20 float": [],
    **{
        f"ResNet-20 W{bits}A{bits} {name}": [{**step, "scheme": scheme, "rules": ENDS, "num_evaluations": 0}]
        if step
        else [weights(scheme, rules=ENDS)]
        for bits, num_steps in ((4, 500), (3, 700))
        for name, scheme, step in (
            ("mse", f"mse:int{bits}/int{bits}-static", {}),
            ("gptq", f"gptq:int{bits}/int{bits}-static", {}),
            ("qat", f"gptq:int{bits}/int{bits}-static", {**IMAGES, "num_steps": num_steps}),
        )
    },
}
KEPT_WORDS = {"exclude": ["*embeddings*"]}
MINILM: dict[str, list[dict[str, Any]]] = {
    "MiniLM float": [],
    "MiniLM W4A8 mse": [weights("mse:int4-g32/int8-dynamic", **KEPT_WORDS)],
    "MiniLM W4A8 gptq": [weights("gptq:int4-g32/int8-dynamic", **KEPT_WORDS)],
    "MiniLM W4A8 qat": [{**TEXTS, "scheme": "gptq:int4-g32/int8-dynamic", **KEPT_WORDS, "num_evaluations": 0}],
}
TEXT_OF = {  # what scales are tuned on
    "SmolLM2 int3-g64 tune-scales on C4": "c4-sample.txt",
    "SmolLM2 int3-g64 tune-scales on WikiText-2 valid": "wikitext2-valid.txt",
}
SMOLLM2: dict[str, list[dict[str, Any]]] = {
    "SmolLM2 float": [],
    **{row: [weights("gptq(num_rounds=0):int3-g64", exclude=[KEPT]), SCALES] for row in TEXT_OF},
}
ROWS = RESNET | MINILM | SMOLLM2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="default: all")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-qat.jsonl")
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        print(json.dumps(measure(args.run, assets, args.share, args.results)))
        return 0
    results = Results(args.results)
    options = [*assets.options, "--share", args.share, "--results", args.results]
    complete = run_rows(args.rows, results, options)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


def measure(row: str, assets: Assets, share: float, results: Path) -> dict[str, Any]:
    """Run one row in this process."""
    steps = [dict(step) for step in ROWS[row]]
    for step in steps:
        if "num_steps" in step:
            step["num_steps"] = max(1, round(share * step["num_steps"]))
    if row in SMOLLM2:
        return {"row": row, **measure_smollm2(steps, assets, TEXT_OF.get(row, ""))}
    return {"row": row, **(measure_resnet if row in RESNET else measure_minilm)(steps, assets, results)}


def made(model: Any, steps: list[dict[str, Any]], task: Any) -> tuple[Any, dict[str, Any]]:
    """The compressed model, read back from its file, and what it took."""
    import copy

    import tersor
    from tersor.checkpoint.container_write import size_of

    if not steps:
        return model, {"bytes": size_of(model), "cpu": 0.0, "wall": 0.0}
    with Meter() as meter:
        compressed = tersor.compress(model, tersor.Recipe.validated({"steps": steps}, "the row"), task)
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(compressed.model, folder)
        loaded = tersor.load(folder, model=None if hasattr(model, "config") else copy.deepcopy(model))
    curves = [{"num_steps": curve.num_steps, "seconds": curve.seconds} for curve in compressed.curves]
    costs = {"cpu": meter.costs.cpu, "wall": meter.costs.wall, "training": curves}
    return loaded, {"bytes": size_of(loaded), **costs}


def judged(name: str, model: Any, original: Any, task: Any, results: Path) -> dict[str, Any]:
    """Score and verdict; the original's scores are kept beside the results."""
    import numpy as np

    from tersor.measure.verdict import Tolerance, judge
    from tersor.tasks.scores import Scores

    scores = task.score(model)
    file = results.with_name(f"{results.stem}-{name}.npy")
    if not file.exists():
        np.save(file, (scores if model is original else task.score(original)).examples)
    before = Scores(scores.metric, np.load(file))
    return {"score": scores.value, "verdict": judge(before, scores, Tolerance.parse("1%")).to_dict()}


def measure_resnet(steps: list[dict[str, Any]], assets: Assets, results: Path) -> dict[str, Any]:
    from models import open_cifar, open_resnet

    model, task = open_resnet(assets.root), open_cifar(assets.root, calibration_examples=256)
    compressed, facts = made(model, steps, task)
    return {**judged("resnet", compressed, model, task, results), **facts}


def measure_minilm(steps: list[dict[str, Any]], assets: Assets, results: Path) -> dict[str, Any]:
    """Calibrated and trained on unlabelled web text, judged on STS-B."""
    from tersor.analysis.sensitivity import divergence, outputs
    from tersor.checkpoint.open import open_model
    from tersor.tasks.data import Data

    text = assets.root / "text"
    source = open_model(str(assets.root / "minilm"))
    task = Data("similarity", text / "stsb-dev.csv").open(source)
    options = {"max_length": 64, "max_examples": 64}
    files = Data("fidelity", text / "wikitext2-valid.txt", options=options, train=text / "c4-sample.txt")
    compressed, facts = made(source.model, steps, files.open(source))
    pairs = [outputs(model, task, NUM_SENTENCES) for model in (source.model, compressed)]
    return {
        **judged("minilm", compressed, source.model, task, results),
        "distance": divergence(*pairs, task.output),
        **facts,
    }


def measure_smollm2(steps: list[dict[str, Any]], assets: Assets, text: str) -> dict[str, Any]:
    """Packed with the calibration windows, tuned on a text, judged on the protocol's windows before and after."""
    from protocol import CONTEXT, open_original, open_protocol
    from transformers import AutoTokenizer

    import tersor
    from tersor.recipe import Recipe
    from tersor.training import Job

    original, task = open_original(assets), open_protocol(assets)
    if not steps:
        return asdict(evaluate(original, original, task))
    packing = Recipe.validated({"steps": steps[:1]}, "the row")
    with Meter() as packed:
        model = tersor.compress(original, packing, task).model
    before = evaluate(model, original, task)
    trained = tersor.open_task(
        "perplexity",
        assets.evaluation,
        train=assets.root / "text" / text,
        tokenizer=AutoTokenizer.from_pretrained(assets.model),
        options={"context": CONTEXT, "calibration_examples": 8},
    )
    tuning = Recipe.validated({"steps": [{**steps[1], "num_evaluations": 0}]}, "the row").steps[0]
    job = Job(model, original, trained)
    with Meter() as tuned:
        tuning.run(job)  # type: ignore[union-attr]
    after = evaluate(job.model, original, task)
    losses = job.curves[0].losses
    return {
        "before": asdict(before),
        **asdict(after),
        "packing_cpu": packed.costs.cpu,
        "cpu": tuned.costs.cpu,
        "wall": tuned.costs.wall,
        "losses": [sum(part) / len(part) for part in (losses[:8], losses[-8:])],
        "num_steps": len(losses),
    }


def line(result: dict[str, Any]) -> str:
    if "perplexity" in result:
        before = result.get("before")
        first = f"{before['perplexity']:.1f}, {before['kl']:.3f}" if before else "-"
        cost = f"{result['cpu']:.0f}" if before else "-"
        return f"| {result['row']} | {first} | {result['perplexity']:.1f}, {result['kl']:.3f} | {cost} |"
    verdict = result["verdict"]
    low, high = verdict["drop_interval"]
    distance = f" {result['distance']:.4f} |" if "distance" in result else ""
    drop = f"{verdict['drop']:+.4f} [{low:+.4f}, {high:+.4f}] {verdict['outcome']}" if result["cpu"] else "-"
    steps = sum(curve["num_steps"] for curve in result.get("training", []))
    return (
        f"| {result['row']} | {result['bytes'] / 1e6:.3f} | {result['score']:.4f} |{distance} {drop} "
        f"| {steps or '-'} | {result['cpu']:.0f} |"
    )


def page(done: dict[str, dict[str, Any]]) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    tables = ["\n".join(line(done[row]) for row in rows if row in done) for rows in (RESNET, MINILM, SMOLLM2)]
    return f"""# Training with quantization against packing alone

Command: `python benchmarks/qat.py --assets FOLDER --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread. CPU seconds are of calibration, training and packing
together, on a machine that others used too. Every compressed model was saved and read back before it was judged.

## ResNet-20, CIFAR-10

W4A4: 4-bit weights per output channel, 4-bit static inputs; first convolution and last linear layer at 8 bits (0.4 % of
the weights); W3A3 the same with 3 bits. Batch norms stay in float. `mse` and `gptq` pack alone, calibrated on 256
training images; `qat` starts from `gptq` and trains with the float model as its teacher: temperature 4, no labels,
AdamW, rate {IMAGES["learning_rate"]}, batch {IMAGES["batch_size"]}, forward pass in bf16, which took two thirds of
float32's time. Accuracy on all 10,000 test images; drop with the 90 % interval, judged at 1 %.

| row | MB | accuracy | drop, verdict | steps | CPU s |
|---|---|---|---|---|---|
{tables[0]}

## all-MiniLM-L6-v2, STS-B dev

W4A8: linear weights `int4-g32`, inputs `int8-dynamic`; embeddings kept in float. Calibrated on 128 passages of
web text (C4), of which the rest trains `qat`: no label and nothing of STS-B is seen. Texts of at most 64 tokens, batch
{TEXTS["batch_size"]}, rate {TEXTS["learning_rate"]}, float32. 1 - cosine is to the original's embeddings of
{NUM_SENTENCES} sentences.

| row | MB | Spearman | 1 - cosine | drop, verdict | steps | CPU s |
|---|---|---|---|---|---|---|
{tables[1]}

## SmolLM2-135M-Instruct, 3 bits

Linear weights of the decoder in `int3-g64`, packed by `gptq(num_rounds=0)` with the calibration windows of protocol.py;
then `tune-scales` for {SCALES["num_steps"]} steps of one window of 512 tokens, taught by the original's logits,
rate {SCALES["learning_rate"]}, forward pass in bf16. Perplexity and KL (nats per token) on the protocol's windows of
WikiText-2 test; CPU seconds of tuning alone.

| row | packed | tuned | CPU s |
|---|---|---|---|
{tables[2]}
"""


if __name__ == "__main__":
    sys.exit(main())
