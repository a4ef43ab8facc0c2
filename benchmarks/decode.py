"""SmolLM2-135M-Instruct writing text: tokens per second, file size and perplexity in four runtimes.

    python benchmarks/decode.py --assets FOLDER [--rows ROW ...] [--work FOLDER] [--results FILE] [--write]

Artifacts and files are made in the work folder (`make` and `file` rows), each is scored in the runtime that it was
written for (`perplexity` rows: whole windows are read at once), and timed (`speed` rows). Every row runs in a process
of its own and is appended to FILE (JSON lines), so that a run that was stopped goes on where it was; `--write` puts
everything in FILE into benchmarks/decode.md. The tokens and windows are those of protocol.py.

Speed rows time their models in turn in one process, on one thread, in CPU time; PyTorch in fp32 and bf16 is in each.
GGUF rows need llama-cpp-python in the same environment; without it they fail, and the others stand.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from protocol import Assets, add_asset_options, open_protocol
from rows import Results, run_rows

SCHEMES = {  # of the decoder's layers, and of the embedding, which is the head too
    "fp16": ("fp16", "fp16"),
    "int8": ("nearest:int8-g32", "nearest:int8-g32"),
    "int4": ("gptq:int4-g32", "gptq:int4-g32"),
    "int4, head int8": ("gptq:int4-g32", "nearest:int8-g32"),
    "int4-g64, head int8": ("gptq:int4-g64", "nearest:int8-g64"),
}


class Row(NamedTuple):
    """A scheme of the table above, or a float type; what it is written for, and what runs it."""

    scheme: str
    to: str
    runtime: str


FILES = {
    "PyTorch fp32": Row("fp32", "folder", "torch"),
    "PyTorch bf16": Row("bf16", "folder", "torch"),
    "PyTorch int4": Row("int4", "artifact", "torch"),
    **{f"ONNX Runtime {scheme}": Row(scheme, "onnx", "onnx") for scheme in ("fp32", *list(SCHEMES)[1:])},
    **{f"OpenVINO {scheme}": Row(scheme, "openvino", "openvino") for scheme in ("fp32", *list(SCHEMES)[1:])},
    "OpenVINO fp32, runs in bf16": Row("fp32", "openvino", "openvino-bf16"),
    "OpenVINO int4, runs in bf16": Row("int4", "openvino", "openvino-bf16"),
    "llama.cpp F16": Row("fp16", "gguf", "llama.cpp"),
    "llama.cpp Q8_0": Row("int8", "gguf", "llama.cpp"),
    "llama.cpp Q4_0": Row("int4", "gguf", "llama.cpp"),
    "llama.cpp Q4_0, head Q8_0": Row("int4, head int8", "gguf", "llama.cpp"),
}
TORCH = ["PyTorch fp32", "PyTorch bf16"]
SPEEDS = {
    "speed PyTorch and ONNX Runtime": ("PyTorch int4", "ONNX"),
    "speed OpenVINO": ("OpenVINO",),
    "speed llama.cpp": ("llama.cpp",),
}
ROWS = [
    *(f"make {scheme}" for scheme in ("fp32", "bf16", *SCHEMES)),
    *(f"file {name}" for name, row in FILES.items() if row.to not in ("folder", "artifact")),
    *(f"perplexity {name}" for name in FILES),
    *SPEEDS,
]
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "gguf": ".gguf", "folder": "", "artifact": ""}
NUM_PROMPT, NUM_NEW = 64, 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asset_options(parser)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help="default: all, in this order")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tersor-decode", metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "tersor-decode.jsonl")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, for perplexities")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    assets = Assets.of(args)
    if args.run:
        args.work.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(args.run, assets, args.work, args.windows)))
        return 0
    results = Results(args.results)
    options = [*assets.options, "--work", args.work, "--windows", args.windows]
    complete = run_rows(args.rows, results, options)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results, args.windows))
    return int(not complete)


def measure(row: str, assets: Assets, work: Path, num_windows: int) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    torch.set_num_threads(1)
    kind, _, name = row.partition(" ")
    if kind == "make":
        return make(name, assets, place(work, Row(name, "artifact", "")))
    if kind == "speed":
        return speed(SPEEDS[row], work)
    file = place(work, FILES[name])
    if kind == "file":
        return write(FILES[name], file, work)
    return {"perplexity": perplexity(str(file), FILES[name].runtime, assets, num_windows)}


def place(work: Path, row: Row) -> Path:
    """Where a file lies; what has no suffix is the artifact itself."""
    return work / (row.scheme.replace(", ", "-").replace(" ", "-") + SUFFIXES[row.to])


def make(scheme: str, assets: Assets, folder: Path) -> dict[str, Any]:
    """The artifact of a scheme, or a copy of the model in a float type."""
    import tersor
    from tersor.checkpoint.open import open_model

    model = open_model(str(assets.model)).model
    if scheme not in SCHEMES:
        model.to(getattr(__import__("torch"), {"fp32": "float32", "bf16": "bfloat16"}[scheme])).save_pretrained(folder)
        tokenizer(assets).save_pretrained(folder)
        return {}
    layers, embedding = SCHEMES[scheme]
    made = tersor.compress(model, tersor.Recipe.of(layers, {"*embed_tokens": embedding}), open_protocol(assets))
    tersor.save(made.model, folder, source=assets.model)
    return {}


def tokenizer(assets: Assets) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.model)


def write(row: Row, file: Path, work: Path) -> dict[str, Any]:
    """Export, with the check that the exporter makes."""
    import tersor

    source = place(work, row._replace(to="artifact"))
    made = tersor.export(source, file, to=row.to, overwrite=True)
    return {"difference": made.check.difference if made.check else None, "notes": made.notes}


def perplexity(file: str, runtime: str, assets: Assets, num_windows: int) -> float:
    """Of the first evaluation windows."""
    import torch

    from tersor.runtimes import open_decoder
    from tersor.tasks.perplexity import window_nll

    decoder = open_decoder(file, runtime)
    nats, count = 0.0, 0
    windows = (ids for batch in open_protocol(assets).batches("eval", 1) for ids in batch.inputs["input_ids"])
    for _, ids in zip(range(num_windows), windows, strict=False):
        decoder.reset()
        logits = torch.from_numpy(decoder.feed(ids[None].numpy()))[0]
        nats += window_nll(logits, ids, 1)[0]
        count += len(ids) - 1
    return math.exp(nats / count)


def num_bytes(file: Path) -> int:
    """Of the weights, with the graph where it is a part of the file."""
    beside = file.parent.glob(f"{file.stem}.bin") if file.suffix == ".xml" else file.glob("*.safetensors")
    return sum(each.stat().st_size for each in [*([file] if file.is_file() else []), *beside])


def speed(starts: tuple[str, ...], work: Path) -> dict[str, Any]:
    """Milliseconds of a token, and of the prompt, in turn."""
    from tersor.jobs.bench import Candidate
    from tersor.jobs.decode import decode
    from tersor.jobs.settings import Timing

    names = [*TORCH, *(name for name in FILES if name.startswith(starts) and name not in TORCH)]
    names = [name for name in names if place(work, FILES[name]).exists()]
    candidates = [Candidate(str(place(work, FILES[name])), FILES[name].runtime) for name in names]
    found = decode(candidates, NUM_PROMPT, NUM_NEW, Timing(seconds=0.0, memory=False, cpu_time=True))
    timings = {
        name: {
            "bytes": num_bytes(place(work, FILES[name])),
            "prompt": timing.prompt.p50,
            "token": timing.token.p50,
            "spread": timing.token.spread,
            "speedup": timing.token.speedup,
            "interval": timing.token.speedup_interval,
        }
        for name, timing in zip(names, found.timings, strict=True)
    }
    return {"timings": timings, "noise": found.noise, "versions": found.versions, "load": os.getloadavg()}


def page(results: Results, num_windows: int) -> str:
    from tersor.measure.scorecard import machine

    about = machine()
    speeds = results.among(SPEEDS)
    versions = dict.fromkeys(version for each in speeds for version in each["versions"])
    loads = ", ".join(f"{each['load'][0]:.1f}" for each in speeds)
    noise = [bound for each in speeds for bounds in each["noise"] for bound in bounds]
    sections = "\n".join(section(each, results) for each in speeds)
    return f"""# SmolLM2-135M-Instruct, writing

Command: `python benchmarks/decode.py --assets FOLDER --write`

tersor {about["tersor"]}, {", ".join(version.split("-releases")[0] for version in versions)},
Python {about["python"]}; {about["processor"]} ({about["cpu_capability"]}).

{NUM_NEW} tokens one by one after a prompt of {NUM_PROMPT}, at batch 1 on one thread, with a cache of keys and values.
The models of a table run in turn in one process; medians of CPU time, the speed-up over PyTorch fp32 with its 95 %
interval (PyTorch fp32 against itself: {min(noise, default=1):.2f} to {max(noise, default=1):.2f}). The machine was
shared by others, with a load of {loads} on two cores: absolute times would be shorter on a quiet one, and ratios are to
be taken within a table. Perplexity is of the file, run in its runtime: the first {num_windows} windows of 512 tokens of
WikiText-2 test; a dash: not measured. MB is the whole file.

int4: `gptq:int4-g32`, calibrated on WikiText-2 valid, embedding and head too. `head int8`: embedding and head are
`nearest:int8-g32` (`-g64` beside int4-g64). int8: `nearest:int8-g32` throughout. GGUF holds the same codes and scales
as the other files: int4-g32 is Q4_0, int8-g32 is Q8_0.

{sections}"""


def section(result: dict[str, Any], results: Results) -> str:
    timings = result["timings"]
    rows = []
    for name, timing in timings.items():
        score = results.get(f"perplexity {name}")
        told = f"{score['perplexity']:.1f}" if score else "-"
        runtime = FILES[name].runtime.removesuffix("-bf16")
        floats = (each for each in timings if FILES[each].runtime == runtime and FILES[each].scheme in ("fp32", "fp16"))
        own = timings[next(floats)]["token"]
        low, high = timing["interval"]
        rows.append(
            f"| {name} | {timing['bytes'] / 1e6:.0f} | {told} | "
            f"{timing['prompt']:.0f} | {timing['token']:.2f} | {1e3 / timing['token']:.0f} | {timing['spread']:.0%} | "
            f"{timing['speedup']:.2f}x [{low:.2f}, {high:.2f}] | {timings[TORCH[1]]['token'] / timing['token']:.2f}x | "
            f"{own / timing['token']:.2f}x |"
        )
    columns = ["MB", "perplexity", "prompt ms", "ms per token", "tokens/s", "spread"]
    header = f"| | {' | '.join(columns)} | over PyTorch fp32 | over bf16 | over its own float |"
    newline = "\n"
    return f"""
## {result["row"].removeprefix("speed ")}

{header}
|{"---|" * 10}
{newline.join(rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
