"""`tersor explain` on models that quantization made slower: the cause, what a profiler says, what the cure gave.

    python benchmarks/explain.py --assets FOLDER --work FOLDER [--rows ROW ...] [--results FILE] [--write]

The assets hold `minilm/` (a Hugging Face folder) and `text/stsb-dev.csv`. The work folder keeps what was compressed
and exported. Each row runs in a process of its own and is appended to FILE (JSON lines), so that a run that was stopped
goes on where it was. `--write` puts everything in FILE into benchmarks/explain.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import Results, run_rows

LENGTH = 32


@dataclass(frozen=True)
class Case:
    """A model that is slower than its float original, and what to do about it.

    Attributes:
        opened: the float model, the slow one and the cure, each as model and runtime.
        profiled: what to look for in the profiler: a method that torch's profiler is told of, or operators.
    """

    what: str
    opened: Callable[[Path, Path], list[tuple[str, str]]]
    kinds: tuple[str, ...]
    profiled: str
    cure: str


def torch_int4(assets: Path, work: Path) -> list[tuple[str, str]]:
    packed = [compressed(assets, work, scheme) for scheme in ("int4-g32", "int8-dynamic")]
    return [(str(assets / "minilm"), "torch"), *((str(folder), "torch") for folder in packed)]


def torch_small(assets: Path, work: Path) -> list[tuple[str, str]]:
    return [("lenet", "torch"), ("lenet int8-dynamic", "torch"), ("lenet", "torch")]


def onnx_signed(assets: Path, work: Path) -> list[tuple[str, str]]:
    names = [exported(work, str(assets / "minilm"), "float"), *(plain_qdq(assets, work, s) for s in ("s8", "u8"))]
    return [(str(name), "onnx") for name in names]


def openvino_dynamic(assets: Path, work: Path) -> list[tuple[str, str]]:
    small = str(exported(work, str(compressed(assets, work, "int8-dynamic")), "int8-dynamic"))
    return [(str(exported(work, str(assets / "minilm"), "float")), "openvino"), (small, "openvino"), (small, "onnx")]


CASES = {
    "int4 in PyTorch": Case(
        "MiniLM, linear layers and embeddings in int4-g32, in PyTorch",
        torch_int4,
        ("decode",),
        "tersor.formats.contract:Encoded.decode",
        "int8-dynamic instead",
    ),
    "a small int8 network": Case(
        "784-300-100-10 with int8-dynamic, in PyTorch",
        torch_small,
        ("quantize",),
        "tersor.activations.quantizers:Int8Dynamic.quantize",
        "left in float",
    ),
    "signed QDQ": Case(
        "MiniLM, static int8 by onnxruntime's own quantizer with signed inputs, in ONNX Runtime",
        onnx_signed,
        ("decode", "quantize"),
        "DequantizeLinear QuantizeLinear",
        "unsigned inputs, the same tool",
    ),
    "dynamic ONNX in OpenVINO": Case(
        "MiniLM int8-dynamic exported for ONNX Runtime, in OpenVINO",
        openvino_dynamic,
        ("float products, packed weights",),
        "MatMulInteger",
        "the same file in ONNX Runtime",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", choices=CASES, default=list(CASES), metavar="ROW")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: results.jsonl in the work folder")
    parser.add_argument("--seconds", type=float, default=4.0, help="of every measurement, about")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.assets / "minilm" / "config.json").exists():
        raise SystemExit(f"needs {args.assets / 'minilm'}: give --assets FOLDER")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.run:
        print(json.dumps(measure(args.run, args.assets, args.work, args.seconds)))
        return 0
    results = Results(args.results or args.work / "results.jsonl")
    options = ["--assets", args.assets, "--work", args.work, "--seconds", args.seconds]
    complete = run_rows(args.rows, results, options, show=line)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(page(results))
    return int(not complete)


# Models.


def compressed(assets: Path, work: Path, scheme: str) -> Path:
    """MiniLM in a scheme, as an artifact."""
    import tersor
    from tersor.checkpoint.open import open_model

    folder = work / f"minilm-{scheme}"
    if not folder.exists():
        source = assets / "minilm"
        made = tersor.compress(open_model(str(source)).model, tersor.Recipe.of(scheme)).model
        tersor.save(made, folder, source=source)
    return folder


def exported(work: Path, model: str, name: str) -> Path:
    """An ONNX file of it, by `tersor export`."""
    import tersor

    path = work / f"minilm-{name}.onnx"
    if not path.exists():
        tersor.export(model, path, to="onnx")
    return path


def plain_qdq(assets: Path, work: Path, signs: str) -> Path:
    """The float export, quantized by onnxruntime's own tool, calibrated on 16 sentences."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from transformers import AutoTokenizer

    path, tokenizer = work / f"minilm-qdq-{signs}.onnx", AutoTokenizer.from_pretrained(assets / "minilm")
    if path.exists():
        return path
    with (assets / "text" / "stsb-dev.csv").open(encoding="utf-8") as file:
        texts = [row[0] for row, _ in zip(csv.reader(file), range(16), strict=False)]

    class Reader(CalibrationDataReader):
        feeds: Iterator[dict[str, Any]] = iter([dict(tokenizer(text, return_tensors="np")) for text in texts])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    quantize_static(
        exported(work, str(assets / "minilm"), "float"),
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8 if signs == "s8" else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
    )
    return path


def lenet(scheme: str) -> Any:
    """LeNet-300-100; what its weights are makes no difference to the time."""
    import torch
    from torch import nn

    import tersor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)).eval()
    return tersor.compress(model, tersor.Recipe.of(scheme)).model if scheme else model


# Measuring.


def measure(row: str, assets: Path, work: Path, seconds: float) -> dict[str, Any]:
    """Time the float model, the slow one and the cure in turn; explain the slow one; ask a profiler."""
    from functools import partial

    from tersor.analysis.explain import explain, growth
    from tersor.analysis.roofline import machine_peaks
    from tersor.measure.latency import measure_calls
    from tersor.measure.scorecard import machine
    from tersor.runtimes import RUNTIMES, open_session
    from tersor.runtimes.feeds import synthetic_feeds
    from tersor.runtimes.torch import TorchSession

    case = CASES[row]
    opened = case.opened(assets, work)
    sessions = [
        TorchSession(lenet(name.removeprefix("lenet").strip()), name)
        if name.startswith("lenet")
        else open_session(name, runtime)
        for name, runtime in opened
    ]
    feeds = [synthetic_feeds(session.inputs, length=LENGTH) for session in sessions]
    calls = [partial(session.run, feed) for session, feed in zip(sessions, feeds, strict=True)]
    from_float = measure_calls(calls, batch_size=1, seconds=3 * seconds, num_rounds=400, clock=time.process_time)
    from_slow = measure_calls(calls[1:], batch_size=1, seconds=2 * seconds, num_rounds=400, clock=time.process_time)
    peaks = machine_peaks(1)
    found = [
        explain(session, feed, peaks, runtime=runtime, seconds=seconds)
        for session, feed, (_, runtime) in zip(sessions[:2], feeds, opened, strict=False)
    ]
    slow, profile = found[1], profiler_of(opened[1][1])
    return {
        "milliseconds": [latency.p50 for latency in from_float],
        "slow_speed": [from_float[1].speedup, *from_float[1].speedup_interval],
        "cure_speed": [from_slow[1].speedup, *from_slow[1].speedup_interval],
        "kinds": slow.kinds,
        "float_kinds": found[0].kinds,
        "grown": growth(*found)[:3],
        "share": sum(slow.kinds[kind] for kind in case.kinds) / slow.seconds,
        "profiler_share": profile(sessions[1], feeds[1], case.profiled),
        "kernel": max((x for x in slow.layers if x.kind in case.kinds), key=lambda x: x.time.seconds).time.kernel,
        "advice": [[each.change, each.share, each.at_most] for each in slow.advice],
        "versions": sorted({RUNTIMES[runtime].version() for _, runtime in opened}),
        "machine": machine(),
    }


def profiler_of(runtime: str) -> Callable[[Any, Any, str], float]:
    return {"torch": torch_share, "onnx": onnx_share, "openvino": openvino_share}[runtime]


def torch_share(session: Any, feeds: Any, method: str) -> float:
    """By torch.profiler: the share of a run's CPU time inside a method, which is marked for it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with marked(method), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(30):
            with record_function("run"):
                session.run(feeds)
    totals = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    return totals["marked"] / totals["run"]


@contextmanager
def marked(method: str) -> Iterator[None]:
    """A method of a class, under the name `marked` in torch's profiler."""
    from importlib import import_module

    from torch.profiler import record_function

    module, _, path = method.partition(":")
    owner, name = getattr(import_module(module), path.split(".")[0]), path.split(".")[1]
    before = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function("marked"):
            return before(*args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, before)


def onnx_share(session: Any, feeds: Any, operators: str) -> float:
    """By the events ONNX Runtime's profiler wrote: operators' kernel time over that of whole runs."""
    import tempfile

    from tersor.runtimes.onnx import open_session

    with tempfile.TemporaryDirectory() as folder:
        profiled = open_session(session.path, 1, profile=Path(folder))
        for _ in range(30):
            profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    spent = sum(e["dur"] for e in kernels if e["args"]["op_name"] in operators.split())
    return spent / sum(e["dur"] for e in events if e["name"] == "model_run")


def openvino_share(session: Any, feeds: Any, prefix: str) -> float:
    """By OpenVINO's counters: nodes whose names begin so, over all nodes and what lies between them."""
    from tersor.runtimes.openvino import compile_model, read_model

    compiled = compile_model(read_model(session.path), session.path, session.settings | {"PERF_COUNT": True})
    request = compiled.create_infer_request()
    rounds = []
    for _ in range(2):  # the first holds what is compiled at first use
        started = time.perf_counter()
        for _ in range(100):
            request.infer(session.in_order(feeds), share_inputs=True)
        whole = time.perf_counter() - started
        rounds.append({info.node_name: info.real_time.total_seconds() for info in request.get_profiling_info()})
    spent = {name: 200 * seconds - 100 * rounds[0][name] for name, seconds in rounds[1].items()}  # averages since start
    return sum(seconds for name, seconds in spent.items() if name.startswith(prefix)) / whole


# The page.


def line(result: dict[str, Any]) -> str:
    ms, slow, cure = result["milliseconds"], result["slow_speed"], result["cure_speed"]
    case, advice = CASES[result["row"]], result["advice"][0]
    return (
        f"| {case.what} | {ms[0]:.3f} | {ms[1]:.3f} | {slow[0]:.2f} [{slow[1]:.2f}, {slow[2]:.2f}] "
        f"| {', '.join(case.kinds)} ({result['kernel']}) | {result['share']:.0%} | {result['profiler_share']:.0%} "
        f"| {advice[2]:.2f} | {case.cure}: {cure[0]:.2f} [{cure[1]:.2f}, {cure[2]:.2f}] |"
    )


def kinds(result: dict[str, Any]) -> str:
    slow, before = result["kinds"], result["float_kinds"]
    rows = "\n".join(
        f"| {kind} | {before[kind] * 1e3:.3f} | {seconds * 1e3:.3f} | {seconds / sum(slow.values()):.0%} |"
        for kind, seconds in slow.items()
        if seconds or before[kind]
    )
    advice = "\n".join(
        f"- {share:.0%} of the run, at most {most:.2f}x: {text}" for text, share, most in result["advice"]
    )
    return f"""## {result["row"]}

{CASES[result["row"]].what}. What `explain` said:

| kind of work | float ms | this ms | share |
|---|---|---|---|
{rows}

{advice}
"""


def page(done: dict[str, dict[str, Any]]) -> str:
    rows = [done[row] for row in CASES if row in done]
    about = rows[-1]["machine"]
    versions = ", ".join(sorted({version for row in rows for version in row["versions"]}))
    listing, details = "\n".join(map(line, rows)), "\n".join(map(kinds, rows))
    return f"""# Slower after quantization: the cause, and what a profiler says of it

Command: `python benchmarks/explain.py --assets FOLDER --work FOLDER --write`

tersor {about["tersor"]}, {versions}, Python {about["python"]};
{about["processor"]} ({about["cpu_capability"]}), one thread, on a machine that others used too. Batch 1; MiniLM with
{LENGTH} tokens.

Times are medians of processor time, taken in turn; speeds have their 95 % intervals: that of the slow model is against
the float model in the same runtime, that of the cure against the slow model. The share is the cause's, of a run: by
`tersor explain`, and by a profiler. In PyTorch that is torch.profiler with the method marked, which shares nothing with
`explain`, and costs time of its own, which shows in the small network. In ONNX Runtime and OpenVINO it is the runtime's
own counters, added up by operator or name: `explain` reads them too, so there the cure is the independent evidence.
"At most" is Amdahl's limit of the first advice. A cure may give more where it takes away more than its cause.

| model | float ms | ms | speed | cause | share, explain | share, profiler | at most | cure and its speed |
|---|---|---|---|---|---|---|---|---|
{listing}

{details}"""


if __name__ == "__main__":
    sys.exit(main())
