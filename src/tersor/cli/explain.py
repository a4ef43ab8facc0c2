"""`tersor explain MODEL`: which layers take the time, what limits them, and what a change could gain at most."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.analysis.explain import KINDS, Explanation, growth
from tersor.analysis.roofline import Peaks
from tersor.cli import options
from tersor.cli.bench import Length, Shape
from tersor.cli.console import events, out, print_json, print_table
from tersor.core.processor import instruction_sets
from tersor.jobs.bench import MadeUp, candidates_of
from tersor.jobs.explain import explain as explain_models
from tersor.jobs.settings import Timing
from tersor.measure.scorecard import machine


def explain(
    model: Annotated[str, typer.Argument(help="Folder, hub id, artifact, .onnx, .xml or package.module:factory.")],
    against: Annotated[
        str | None, typer.Option(help="The float model it should be faster than, in the same runtime or another.")
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Runtime of both models, or one each (see bench); default: by file.")
    ] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="State dicts or artifact folders of the factories, in this order.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size.", min=1)] = 1,
    length: Length = None,
    shape: Shape = None,
    threads: options.Threads = 1,
    dtype: options.Dtype = None,
    seconds: Annotated[float, typer.Option(help="About how long to profile.")] = 2.0,
    rows: Annotated[int, typer.Option(help="Slowest layers that are listed; --json holds all.")] = 12,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure this machine's peak rates again, not use the saved.")
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Say why a model is not faster: its time by kind of work, by layer, and against this machine's roofline."""
    specs = options.models_of([model, against] if against else [model], weights, dtype)
    candidates = candidates_of(specs, runtime or [])
    inputs, timing = MadeUp(length, options.shape_of(shape)), Timing((batch,), (threads,), seconds=seconds)
    with events(json) as listener:
        found = explain_models(candidates, inputs, timing, seed, remeasure, listener)
    if json:
        print_json(found.to_dict() | {"measured_on": machine()})
        return
    told_of = f"{model} in {candidates[0].runtime}: {found.shapes}, threads: {threads}"
    out.print(told_of, markup=False, highlight=False)
    show(found.explanations, [c.model for c in candidates], found.peaks, rows)


def show(found: list[Explanation], names: list[str], peaks: Peaks, rows: int) -> None:
    """Print the time by kind of work, the slowest layers, and the advice."""
    first = found[0]
    heads = ["ms", "share"] if len(found) == 1 else ["ms", "share", "against: ms", "share"]
    rows_of_kinds = [
        (kind, *(cell for each in found for cell in (ms(each.kinds[kind]), part(each, kind))))
        for kind in KINDS
        if any(each.kinds[kind] for each in found)
    ]
    whole = ("whole run", *(cell for each in found for cell in (ms(each.seconds), "100%")))
    print_table("where a run's time goes", ["", *heads], [*rows_of_kinds, whole])
    slowest = sorted(first.layers, key=lambda layer: -layer.time.seconds)[:rows]
    print_table(
        f"the {len(slowest)} slowest of {len(first.layers)} layers",
        ["layer", "kernel", "ms", "share", "MACs/byte", "bound", "of bound"],
        [
            (
                layer.time.name,
                layer.time.kernel,
                ms(layer.time.seconds),
                f"{layer.time.seconds / first.seconds:.1%}",
                f"{layer.bound.intensity:.1f}" if layer.bound else "-",
                layer.bound.by if layer.bound else "-",
                f"{layer.bound.seconds / layer.time.seconds:.0%}" if layer.bound and layer.time.seconds else "-",
            )
            for layer in slowest
        ],
    )
    rates = ", ".join(
        f"{precision} {rate / 1e9:.0f} (ridge {peaks.ridge(precision, first.working_set):.1f})"
        for precision, rate in peaks.macs.items()
    )
    bandwidth = peaks.bandwidth_of(first.working_set) / 1e9
    out.print(
        f"this machine ({', '.join(instruction_sets())}): {rates} billion MACs/s; {bandwidth:.0f} GB/s for the "
        f"{first.working_set / 1e6:.1f} MB that the products go through; {first.num_calls} operators per run",
        markup=False,
        highlight=False,
    )
    for line in conclusions(found, names):
        out.print(line, style="bold", markup=False, highlight=False)


def conclusions(found: list[Explanation], names: list[str]) -> list[str]:
    """Sentences: the comparison with the float model, and the advice."""
    first, lines = found[0], []
    if len(found) == 2:
        ratio = found[1].seconds / first.seconds
        kind, more = growth(found[1], first)[0]
        lines.append(
            f"{ms(first.seconds)} ms against {ms(found[1].seconds)} ms of {names[1]}: "
            + (f"{ratio:.2f}x as fast" if ratio > 1 else f"{1 / ratio:.2f}x slower")
            + (f"; {kind} grew most, by {ms(more)} ms" if more > 0 else "")
        )
    for each in first.advice:
        lines.append(f"{each.share:.0%} of the run, at most {each.at_most:.2f}x from it: {each.change}")
    if not first.advice:
        lines.append("nothing stands out: the run is spread over many small parts")
    return lines


def ms(seconds: float) -> str:
    """Seconds as text in milliseconds."""
    return f"{seconds * 1e3:.3f}"


def part(found: Explanation, kind: str) -> str:
    """The share of a kind of work."""
    return f"{found.kinds[kind] / found.seconds:.1%}" if found.seconds else "-"
