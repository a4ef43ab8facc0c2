"""all-MiniLM-L6-v2, entropy-coded at one noise level: what the embeddings keep at the bytes the file really takes.

    python benchmarks/coded_minilm.py --assets FOLDER [--rows ROW ...] [--llama-python VENV/bin/python]
        [--results FILE] [--write]

`encoder B`: the linear weights (embeddings kept) at the level for which the forecast says B bits a weight; the bytes
are those of `model.tersor` less what the kept tensors take in it. `whole B`: all weights, embeddings inside, at B bits
a weight. A number after B is that of the trellis's states. Levels come from the forecast and are not refined, so that
each row is one model; the table says what the file takes. `size X`: all weights in a file of at most X, by the search
of `tersor compress --coded --size X`. `scheme S`: all weights in another scheme, as safetensors. `gguf TYPE`:
llama.cpp's own quantizer, by llama-cpp-python in an environment of its own (`pip install llama-cpp-python`), from a
file in fp16.

The protocol is that of minilm_quality.py: calibration on 128 pairs of STS-B dev, judged on the others. Rows are
appended to FILE (JSON lines), so that a run that was stopped goes on where it was; `--write` puts everything in FILE
into coded_minilm.md, and draws coded_minilm.svg (`pip install matplotlib`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rows import Results
from torch import nn

import tersor
from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.divergence import divergence, outputs
from tersor.checkpoint.container import Container
from tersor.checkpoint.layout import CODED
from tersor.checkpoint.manifest import WEIGHTS
from tersor.checkpoint.open import open_model
from tersor.measure.scorecard import machine
from tersor.measure.verdict import Tolerance, judge
from tersor.methods.stats import Stats
from tersor.methods.waterfill import bounds_at
from tersor.recipe import Recipe
from tersor.schemes.scheme import KEEP, Scheme
from tersor.search.choices import NUM_STATES
from tersor.search.limit import Limit, parse_size
from tersor.search.noise_level import NoiseLevelSearch
from tersor.tasks.contract import Task
from tersor.tasks.data import Data

FORECAST = [
    *(f"encoder {bits}" for bits in (4, 3.5, 3, 2.5, 2, 1.5)),
    *(f"encoder {bits} 64" for bits in (4, 3.5, 3, 2.5, 2, 1.5)),
    *(f"whole {bits}" for bits in (8, 6, 4.2, 3, 2, 1.5, 1)),
    *(f"whole {bits} 64" for bits in (8, 4.2, 3, 2, 1.5, 1)),
]
SIZES = [f"size {size}" for size in ("6MB", "4.5MB", "3MB", "2MB")]
OTHERS = [
    *(f"scheme {scheme}" for scheme in ("int8", "gptq:int4-g64", "gptq:int3-g64", "gptq:int2-g64")),
    *(f"gguf {kind}" for kind in ("Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K")),
]
ROWS = [*FORECAST, *SIZES, *OTHERS]
NUM_SENTENCES = 512  # whose embeddings are compared with the original's
IN_FLOAT32 = ("position_embeddings", "token_type_embeddings")  # as llama.cpp's converter has them
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
    parser.add_argument("--assets", type=Path, default=os.environ.get("TERSOR_ASSETS", "."))
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all of the table")
    parser.add_argument("--llama-python", type=Path, help="the interpreter of an environment with llama-cpp-python")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-coded-minilm.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, folder = args.assets / "text" / "stsb-dev.csv", args.assets / "minilm"
    if not data.exists() or not (folder / "config.json").exists():
        print(f"needs {data} and {folder}: give --assets FOLDER", file=sys.stderr)
        return 2
    results = Results(args.results)
    left = [row for row in args.rows if row not in results]
    if args.llama_python is None and any(row.startswith("gguf") for row in left):
        parser.error("the rows of GGUF need --llama-python; without it, name others with --rows")
    if left:
        source = open_model(str(folder))
        task = Data("similarity", data).open(source)
        original, stats = task.score(source.model), estimate_fisher(source.model, task)
        before = list(outputs(source.model, task, "eval", NUM_SENTENCES))
    for row in left:
        kind, setting = row.split()[:2]
        if kind == "gguf":
            loaded, facts = by_llama(source.model, folder, setting, args.llama_python)
        elif kind in ("scheme", "size"):
            loaded, facts = by_tersor(source.model, folder, task, stats, kind, setting)
        else:
            loaded, facts = at_forecast(source.model, folder, task, stats, row)
        scores = task.score(loaded)
        facts |= {
            "distance": divergence(before, outputs(loaded, task, "eval", NUM_SENTENCES), task.output),
            "spearman": scores.value,
            "verdict": judge(original, scores, Tolerance.parse("1%")).to_dict(),
        }
        print(line(results.add(row, facts)), flush=True)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
        draw(results, Path(__file__).with_suffix(".svg"))
    return 0


Made = tuple[nn.Module, dict[str, Any]]  # the model, read back from its file, and what is known of the file


def at_forecast(model: nn.Module, folder: Path, task: Task, stats: dict[str, Stats], row: str) -> Made:
    """At the level that the forecast names."""
    began = time.process_time()
    kind, bits, num_states = [*row.split(), "0"][:3]
    step = Recipe.of(KEEP, exclude=["*embeddings*"] if kind == "encoder" else []).weights[0]
    searching = NoiseLevelSearch(model, task, step, stats, num_states=int(num_states))
    forecast = searching.foresee()
    found = searching.make(forecast.level_of(float(bits)))
    seconds = time.process_time() - began
    scheme = found.recipe.weights[0].scheme
    level = Scheme.parse(scheme).method.level  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as place:
        tersor.save(found.made.model, place, source=folder)
        container = Container(Path(place) / CODED)
        parts = {f"{site.name}.weight" for site in found.made.sites}
        kept_bytes = sum(container.stored_bytes(n) for n in container.entries if n.rpartition(".")[0] not in parts)
        file_bytes = (Path(place) / CODED).stat().st_size
        loaded = tersor.load(place, packed=False)
    return loaded, {
        "scheme": scheme,
        "bytes": file_bytes,
        "bits": 8 * (file_bytes - kept_bytes) / forecast.num_weights,
        "bound": bound_at(forecast.counts, level) / forecast.num_weights,
        "predicted": forecast.num_weights * level**2 / 24,
        "seconds": seconds,
    }


def bound_at(counts: torch.Tensor, level: float) -> float:
    """Bits that no code can do without, at the error of this level, were the weights normal numbers: their
    rate-distortion function (Shannon 1959)."""
    return counts.dot(bounds_at(counts, level)).item()


def by_tersor(model: nn.Module, folder: Path, task: Task, stats: dict[str, Stats], kind: str, setting: str) -> Made:
    """In a size, or by a scheme."""
    began = time.process_time()
    if kind == "size":
        searching = NoiseLevelSearch(model, task, Recipe.of(KEEP).weights[0], stats, num_states=NUM_STATES)
        made = searching.within(Limit(parse_size(setting), setting)).made.model
    else:
        made = tersor.compress(model, Recipe.of(setting), task, stats=stats).model
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory() as place:
        tersor.save(made, place, source=folder)
        file = next(Path(place) / name for name in (CODED, WEIGHTS) if (Path(place) / name).exists())
        return tersor.load(place, packed=False), {"bytes": file.stat().st_size, "seconds": seconds}


def by_llama(model: nn.Module, folder: Path, kind: str, python: Path) -> Made:
    """The matrices that llama.cpp quantized, in a copy of the model. Its file here has no tokenizer in it."""
    import gguf

    with tempfile.TemporaryDirectory() as place:
        whole, quantized = Path(place) / "whole.gguf", Path(place) / "quantized.gguf"
        names = write_gguf(model, whole)
        began = time.process_time()
        command = [str(python), "-c", QUANTIZE, str(whole), str(quantized), kind]
        done = subprocess.run(command, capture_output=True, check=True)
        loaded = open_model(str(folder)).model
        weights = dict(loaded.named_parameters())
        for tensor in gguf.GGUFReader(quantized).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            weights[names[tensor.name]].data = torch.from_numpy(values.copy()).view(weights[names[tensor.name]].shape)
        version = done.stdout.decode().split()[-1]
        return loaded, {"bytes": quantized.stat().st_size, "seconds": time.process_time() - began, "llama": version}


def write_gguf(model: nn.Module, output: Path) -> dict[str, str]:
    """The encoder in fp16, as llama.cpp names its tensors; returns the model's name of each."""
    import gguf

    config, found = model.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    writer = gguf.GGUFWriter(output, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_vocab_size(config.vocab_size)
    for name, parameter in model.named_parameters():
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if given is None:  # the pooler, which sentence embeddings do not use
            continue
        found[given] = name
        in_half = parameter.dim() > 1 and not any(part in name for part in IN_FLOAT32)
        writer.add_tensor(given, (parameter.detach().half() if in_half else parameter.detach().float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def line(result: dict[str, Any]) -> str:
    verdict, (kind, setting) = result["verdict"], result["row"].split()[:2]
    low, high = verdict["drop_interval"]
    drop = f"{verdict['drop']:+.4f} [{low:+.4f}, {high:+.4f}] {verdict['outcome']}"
    if "scheme" not in result:
        name = {"size": f"coded, {setting}", "scheme": f"`{setting}`", "gguf": f"llama.cpp, {setting}"}[kind]
        return (
            f"| {name} | {result['bytes'] / 1e6:.2f} | {result['distance']:.4f} | {result['spearman']:.4f} | {drop} "
            f"| {result['seconds']:.0f} |"
        )
    return (
        f"| {result['row']} | `{result['scheme']}` | {result['bits']:.3f} | {result['bits'] - result['bound']:+.2f} "
        f"| {result['bytes'] / 1e6:.2f} | {result['distance']:.4f} | {result['predicted']:.4f} "
        f"| {result['spearman']:.4f} | {drop} | {result['seconds']:.0f} |"
    )


SERIES = {"whole": "coded", "size": "coded by size", "scheme": "integers", "gguf": "GGUF of llama.cpp"}
MARKS = {"coded": "o-", "coded, 64 states": "d-", "coded by size": "*", "integers": "s", "GGUF of llama.cpp": "^"}


def series_of(row: str) -> str:
    kind, _, *num_states = row.split()
    return SERIES[kind] + (f", {num_states[0]} states" if num_states else "")


def draw(results: Results, path: Path) -> None:
    """Spearman over the size of the whole file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tersor", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    shown = [result for result in results.among(ROWS) if result["row"].split()[0] in SERIES]
    for series, mark in MARKS.items():
        points = [result for result in shown if series_of(result["row"]) == series]
        if not points:
            continue
        points.sort(key=lambda result: result["bytes"])
        sizes, scores = [point["bytes"] / 1e6 for point in points], [point["spearman"] for point in points]
        axes.plot(sizes, scores, mark, label=series, markersize=4, linewidth=1)
        for point, x, y in zip(points, sizes, scores, strict=True):
            if not series.startswith("coded"):
                label = point["row"].split()[1].removeprefix("gptq:")
                axes.annotate(label, (x, y), xytext=(3, -10), textcoords="offset points", fontsize=7)
    original = [result["spearman"] + result["verdict"]["drop"] for result in shown]
    axes.axhline(original[0], color="gray", linewidth=0.8, linestyle=":", label="original, 90.9 MB")
    axes.set(xlabel="file, MB", ylabel="Spearman, STS-B dev", xlim=(0, 26))
    axes.legend(loc="lower right")
    axes.grid(linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def page(results: Results) -> str:
    about = machine()
    listing = "\n".join(map(line, results.among(FORECAST)))
    others = "\n".join(map(line, results.among([*SIZES, *OTHERS])))
    llama = ", ".join(sorted({result["llama"] for result in results.values() if "llama" in result}))
    return f"""# all-MiniLM-L6-v2, entropy-coded

Command: `python benchmarks/coded_minilm.py --assets FOLDER --llama-python VENV/bin/python --write`

tersor {about["tersor"]}, torch {about["torch"]}, transformers {about["transformers"]}, llama-cpp-python {llama}, Python
{about["python"]}; {about["processor"]} ({about["cpu_capability"]}).

1 - cosine to the original's embeddings is over {NUM_SENTENCES} sentences. Spearman and its drop, with the 90 % interval
judged at 1 %, are over 1,372 pairs of STS-B dev; 128 others are for calibration.

![Spearman over the size of the file](coded_minilm.svg)

## Levels

`encoder B` asks the forecast for B bits a weight over the linear weights (embeddings kept in fp32), `whole B` over all
weights, embeddings inside; a number after B is that of the trellis's states. Bits are bytes of `model.tersor`, less
those of the tensors that are kept; headers and all side information are inside. The gap is to the rate-distortion
function of normal weights with these deviations at the level's error: 0.25 bits is what scalar codes leave at best
where many bits are spent. Predicted is `level^2 / 24` for every weight. CPU seconds are of forecast and compression.

| row | scheme | bits | gap | MB | 1 - cosine | predicted | Spearman | drop, verdict | CPU s |
|---|---|---|---|---|---|---|---|---|---|
{listing}

On the same protocol (minilm_quality.md), over the linear weights: `gptq:int4-g64` .0107 at 4.25 bits, `gptq:int3-g64`
.0393 at 3.25, `gptq:int2-g64` .1310 at 2.25; whole files by `plan`: 12.98 MB .0099, 9.09 MB .0475, 7.57 MB .0828.

## Sizes, and the files of others

All weights, embeddings inside. *coded*: the search of `tersor compress --coded --size`, {NUM_STATES} states, which
corrects the level of every linear layer by its measured loss. A scheme is over all sites, in `model.safetensors`.
llama.cpp: its own quantizer, without an importance matrix, from fp16; rows of 384 columns hold no block of 256, so that
most matrices get other types than the file's name says, word embeddings Q8_0. No tokenizer is inside.

| file | MB | 1 - cosine | Spearman | drop, verdict | CPU s |
|---|---|---|---|---|---|
{others}
"""


if __name__ == "__main__":
    sys.exit(main())
