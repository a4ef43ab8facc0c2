"""SmolLM2-135M-Instruct, entropy-coded at one noise level: perplexity at the bits that the file really takes.

    python benchmarks/coded_smollm2.py --assets FOLDER [--rows ROW ...] [--llama-python VENV/bin/python]
        [--results FILE] [--write]

`linear B`: the level at which the decoder's linear weights take B bits each, embeddings and head kept; the bytes are
those of `model.tersor` less what the kept tensors take in it. A number after B is that of the trellis's states. Levels
come from the forecast and are not refined, so that each row is one model; the table says what the file takes. `tuned
B`: the same model after the step `tune-scales`, its bytes counted again. `size X`: the whole model, embeddings and head
inside, in a file of at most X, by the search of `tersor compress --coded --size X`. `gguf TYPE`: llama.cpp's own
quantizer, by llama-cpp-python in an environment of its own (`pip install llama-cpp-python`), from the file in fp16 that
tersor exports; transformers dequantizes it.

Statistics and models that rows share lie beside FILE, in a folder of its name. The protocol is that of protocol.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from rows import Results, child_environment, last_line

if TYPE_CHECKING:
    from torch import nn

    from tersor.methods.stats import Stats
    from tersor.tasks import Task

LINEAR = [f"linear {bits}{states}" for states in ("", " 64") for bits in (4, 3, 2.5, 2)]
TUNED = [f"tuned {bits} 64" for bits in (3, 2.5, 2)]
GGUF = [f"gguf {kind}" for kind in ("Q4_K_M", "Q3_K_M", "Q2_K")]
SIZES = [f"size {size} 64" for size in ("88.2MB", "70MB", "60MB", "50MB", "42MB")]
ROWS = [*LINEAR, *TUNED, *GGUF, *SIZES]
TUNING: dict[str, Any] = {
    "num_steps": 48,
    "batch_size": 1,
    "learning_rate": 2e-3,
    "precision": "bf16",
    "num_evaluations": 0,
}
SIDES = ("row_weight", "column_weight")
QUANTIZE = """
import ctypes, sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3]), 1
code = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings))
print(llama_cpp.__version__)
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--llama-python", type=Path, help="the interpreter of an environment with llama-cpp-python")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-smollm2.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        measure(args.rows, assets, Results(args.results), args.llama_python)
        return 0
    left = [row for row in args.rows if row not in Results(args.results)]
    if args.llama_python is None and any(row.startswith("gguf") for row in left):
        parser.error("the rows of GGUF need --llama-python; without it, name others with --rows")
    failed = 0
    if left:
        options = [*assets.options, "--results", str(args.results)]
        options += ["--llama-python", str(args.llama_python)] if args.llama_python else []
        command = [sys.executable, __file__, *options, "--run", "--rows", *left]
        child = subprocess.run(command, env=child_environment(1), stderr=subprocess.PIPE)
        failed = child.returncode
        if failed:
            print(last_line(child.stderr), file=sys.stderr)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(Results(args.results)))
    return int(failed != 0)


def measure(rows: list[str], assets: Assets, results: Results, llama_python: Path | None) -> None:
    """One row after the other; what is done is appended to the results."""
    from tersor.checkpoint.open import open_model

    model, original, task = open_model(str(assets.model)).model, open_original(assets), open_protocol(assets)
    models = results.path.with_suffix(".models")
    models.mkdir(exist_ok=True)
    stats = curvature(model, task, models) if any(row.startswith(("linear", "size")) for row in rows) else {}
    for row in rows:
        kind, setting = row.split(maxsplit=1)
        folder = models / row.replace(" ", "-")
        if kind == "gguf":
            assert llama_python is not None
            result = measure_gguf(setting, assets, models, original, task, llama_python)
        elif kind == "tuned":
            result = measure_tuned(folder, assets, original, task)
        else:
            with Meter() as meter:
                made, scheme = coded(kind, setting, model, task, stats)
            result = saved(made, folder, assets, original, task)
            result |= {"scheme": scheme, **meter.costs.to_dict()}
        print(line(results.add(row, result)), flush=True)


def curvature(model: nn.Module, task: Task, models: Path) -> dict[str, Stats]:
    """The statistics of every site, gathered the first time."""
    from safetensors.torch import load_file, save_file

    from tersor.calibration.curvature import estimate_fisher
    from tersor.methods.stats import Stats

    path = models / "curvature.safetensors"
    if not path.exists():
        found = estimate_fisher(model, task)
        sides = [(f"{name} {side}", getattr(each, side)) for name, each in found.items() for side in SIDES]
        save_file({key: tensor.contiguous() for key, tensor in sides}, path)
    tensors = load_file(path)
    names = dict.fromkeys(key.split()[0] for key in tensors)
    return {name: Stats(**{side: tensors[f"{name} {side}"] for side in SIDES}) for name in names}


def coded(kind: str, setting: str, model: nn.Module, task: Task, stats: dict[str, Stats]) -> tuple[nn.Module, str]:
    """At so many bits a linear weight, or in a file of so many bytes, with a trellis or without."""
    from tersor.recipe import Recipe
    from tersor.schemes.scheme import KEEP
    from tersor.search.limit import Limit, parse_size
    from tersor.search.noise_level import NoiseLevelSearch

    step = Recipe.of(KEEP, exclude=[KEPT] if kind == "linear" else []).weights[0]
    size, num_states = [*setting.split(), "0"][:2]
    searching = NoiseLevelSearch(model, task, step, stats, num_states=int(num_states))
    if kind == "size":
        found = searching.within(Limit(parse_size(size), size))
    else:
        found = searching.make(searching.foresee().level_of(float(size)))
    return found.made.model, found.recipe.weights[0].scheme


def measure_tuned(folder: Path, assets: Assets, original: nn.Module, task: Task) -> dict[str, Any]:
    """The model of a row `linear`, its scales trained on WikiText-2 valid, whose windows calibrated it."""
    from transformers import AutoTokenizer

    import tersor
    from tersor.training import Job, TuneScalesStep

    source = folder.with_name(folder.name.replace("tuned", "linear"))
    if not source.exists():
        raise SystemExit(f"needs {source}: run the row {source.name.replace('-', ' ')} before")
    trained = tersor.open_task(
        "perplexity",
        assets.evaluation,
        train=assets.calibration,
        tokenizer=AutoTokenizer.from_pretrained(assets.model),
        options={"context": CONTEXT, "calibration_examples": 8},
    )
    job = Job(tersor.load(source), original, trained)
    with Meter() as meter:
        TuneScalesStep(**TUNING).run(job)
    result = saved(job.model, folder, assets, original, task)
    return result | meter.costs.to_dict()


def saved(model: nn.Module, folder: Path, assets: Assets, original: nn.Module, task: Task) -> dict[str, Any]:
    """Written, read back and judged."""
    import tersor
    from tersor.checkpoint.container import Container
    from tersor.checkpoint.layout import CODED, packed_sites

    tersor.save(model, folder, source=assets.model)
    container = Container(folder / CODED)
    sites = [site for site, _, _ in packed_sites(model)]
    parts = {site.parameter for site in sites}
    kept = [name for name in container.entries if name.rpartition(".")[0] not in parts]
    file_bytes = (folder / CODED).stat().st_size
    num_bytes = file_bytes - sum(map(container.stored_bytes, kept))
    quality = evaluate(tersor.load(folder, packed=False).float(), original, task)
    bits = 8 * num_bytes / sum(site.num_weights for site in sites)
    return {**asdict(quality), "bits": bits, "file_bytes": file_bytes}


def measure_gguf(
    kind: str, assets: Assets, models: Path, original: nn.Module, task: Task, llama_python: Path
) -> dict[str, Any]:
    """A file of llama.cpp's, dequantized and judged, and the types that its matrices really have."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    whole, file = models / "fp16.gguf", models / f"{kind}.gguf"
    if not whole.exists():
        write_whole(assets, whole)
    with Meter() as meter:
        command = [str(llama_python), "-c", QUANTIZE, str(whole), str(file), kind]
        done = subprocess.run(command, env=child_environment(1), capture_output=True, check=True)
    matrices = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]
    types: Counter[str] = Counter()
    for tensor in matrices:
        types[tensor.tensor_type.name] += tensor.n_elements
    model = AutoModelForCausalLM.from_pretrained(models, gguf_file=file.name, dtype=torch.float32).eval()
    num_weights = sum(types.values())
    return {
        **asdict(evaluate(model, original, task)),
        "bits": 8 * sum(tensor.n_bytes for tensor in matrices) / num_weights,
        "file_bytes": file.stat().st_size,
        "scheme": ", ".join(f"{100 * count / num_weights:.0f} % {name}" for name, count in types.most_common()),
        "llama": done.stdout.decode().split()[-1],
        **meter.costs.to_dict(),
    }


def write_whole(assets: Assets, output: Path) -> None:
    """The model in fp16, as llama.cpp reads it."""
    import tersor
    from tersor.checkpoint.open import open_model
    from tersor.exporters.gguf import Gguf
    from tersor.jobs.export import open_checkpoint

    made = tersor.compress(open_model(str(assets.model)).model, tersor.Recipe.of("fp16"))
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(made.model, folder, source=assets.model)
        list(Gguf().write(open_checkpoint(Path(folder)), output))


def line(result: dict[str, Any]) -> str:
    kind, setting = result["row"].split(maxsplit=1)
    end = f"{result['perplexity']:.2f} | {result['kl']:.3f} | {result['cpu']:.0f} |"
    if kind == "linear":
        return f"| {setting} | `{result['scheme']}` | {result['bits']:.3f} | {result['file_bytes'] / 1e6:.1f} | {end}"
    if kind == "tuned":
        return f"| {setting} | {result['bits']:.3f} | {result['file_bytes'] / 1e6:.1f} | {end}"
    made = f"`{result['scheme']}`" if kind == "size" else result["scheme"]
    name = f"tersor, {setting.split()[0]}" if kind == "size" else f"llama.cpp, {setting}"
    return f"| {name} | {made} | {result['file_bytes'] / 1e6:.2f} | {result['bits']:.2f} | {end}"


def page(results: Results) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    linear, tuned, gguf, sizes = (results.among(rows) for rows in (LINEAR, TUNED, GGUF, SIZES))
    llama = gguf[0]["llama"] if gguf else "none"
    sections = [SECTION_LINEAR + table(linear) + PEERS]
    if tuned:
        sections.append(SECTION_TUNED + table(tuned))
    if gguf or sizes:
        sections.append(SECTION_WHOLE.replace("OVERHEAD", gguf_overhead(gguf)) + table(gguf + sizes))
    listing = "\n".join(sections)
    return f"""# SmolLM2-135M-Instruct, entropy-coded

Command: `python benchmarks/coded_smollm2.py --assets FOLDER --llama-python VENV/bin/python --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, llama-cpp-python {llama}, Python
{about["python"]}; {about["processor"]} ({about["cpu_capability"]}), one thread.

Calibration: 32 windows of 512 tokens of WikiText-2 valid. Perplexity (29.60 in float) and KL to the original (nats per
token): first 8,192 tokens of WikiText-2 test, windows of 512, float32, from the saved file. Differences of perplexity
under 3 % are noise.

{listing}"""


def table(results: list[dict[str, Any]]) -> str:
    return "\n".join(map(line, results)) + "\n"


SECTION_LINEAR = """## The decoder's linear weights

Embeddings and head are kept in bf16. A row asks the forecast for so many bits a weight; a number after them is that of
the trellis's states. Bits are bytes of `model.tersor`, less those of the tensors that are kept; headers and all side
information are inside. CPU seconds are of forecast and compression, without the curvature.

| asked | scheme | bits | file MB | perplexity | KL | CPU s |
|---|---|---|---|---|---|---|
"""
PEERS = """
On the same protocol (smollm2.md, peers.md): `gptq:int4-g64` 31.8 at 4.25 bits, `autoround:int3-g64` 34.1 and
`gptq:int3-g64` 37.3 at 3.25, `autoround:int2-g64` 49.6 and `gptq:int2-g64` 65.4 at 2.25.
"""
SECTION_TUNED = f"""## The same, scales tuned

The models above after `tune-scales`: {TUNING["num_steps"]} steps of one window of {CONTEXT} tokens of WikiText-2 valid,
taught by the original's logits, rate {TUNING["learning_rate"]}, forward pass in bf16. Bits are counted again: trained
exponents take finer steps. CPU seconds are of tuning alone. At 3 bits the gain is within noise, and KL does not share
it.

| asked | bits | file MB | perplexity | KL | CPU s |
|---|---|---|---|---|---|
"""
SECTION_WHOLE = """## The whole file, beside GGUF

Embeddings and head inside. tersor: the search of `tersor compress --coded --size`, 64 states. llama.cpp: its own
quantizer, without an importance matrix, from the fp16 file that tersor exports. Rows of 576 columns hold no block of
256, so that most matrices get other types than the file's name says: the shares are of weights. The tokenizer is inside
the GGUF files (OVERHEAD).

| file | made by | MB | bits a weight | perplexity | KL | CPU s |
|---|---|---|---|---|---|---|
"""


def gguf_overhead(results: list[dict[str, Any]]) -> str:
    """What is in the files beside matrices."""
    if not results:
        return "not measured"
    return f"{(results[0]['file_bytes'] - results[0]['bits'] * 134_479_872 / 8) / 1e6:.1f} MB with the norms"


if __name__ == "__main__":
    sys.exit(main())
