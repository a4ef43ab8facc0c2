"""`tersor compress MODEL --size 8MB -o OUT`: the main job."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.checkpoint.manifest import weights_name
from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import err, events, leave, out, print_json, print_table
from tersor.cli.options import task_data
from tersor.core.errors import InputError
from tersor.jobs.compress import Result
from tersor.jobs.compress import compress as compress_model
from tersor.jobs.settings import Output
from tersor.jobs.stream import stream as compress_streamed
from tersor.recipe import Recipe
from tersor.report.card import comparison, megabytes
from tersor.report.hints import hints
from tersor.schemes.assignment import Cpu
from tersor.schemes.scheme import KEEP
from tersor.search.choices import Budget, Choices
from tersor.search.trials import Trial


def compress(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder or hub id, or package.module:factory (with --weights).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    size: Annotated[str | None, typer.Option(help="Budget: size of the weights file, such as 8MB or 1.5GiB.")] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Budget: times smaller than the original weights, such as 6x.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Budget: bits per parameter of the whole file, over all parameters.")
    ] = None,
    drop: Annotated[
        str | None,
        typer.Option(
            help="Largest tolerated loss of the score: 1% or 0.01. Alone: find the smallest model within it. "
            "With another budget: the tolerance of the verdict (default 1%)."
        ),
    ] = None,
    coded: Annotated[
        bool,
        typer.Option(
            "--coded", help="Meet the budget with entropy-coded weights: the smallest file, decoded when it is loaded."
        ),
    ] = False,
    num_states: Annotated[
        int | None,
        typer.Option(
            help="With --coded, states of the trellis along which codes are chosen, 4 to 256 (default 64): up to a "
            "tenth smaller at the same quality. 0 is none, which loads faster."
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Scheme for every site, such as int4-g64, hqq:int4-g64-asym, int8-dynamic. "
            "With a budget, repeat it to name the candidates."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method for --format, such as nearest, mse, hqq.")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="PATTERN=SCHEME for some sites, such as '*.embeddings.*=int8-g32'.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of sites to leave as they are.")] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(help="Rewrite the model first without changing what it computes, such as smooth, awq, fold-bn."),
    ] = None,
    bias_correction: Annotated[
        bool,
        typer.Option("--bias-correction", help="Change biases so that the mean of each output stays what it was."),
    ] = False,
    keep_float: Annotated[
        str,
        typer.Option(
            help="auto: the sites that cost most by measured loss stay float; a number: that many of them; or none."
        ),
    ] = "none",
    cpu: Annotated[
        Cpu,
        typer.Option(
            help="Where int8 weights with int8 inputs multiply exactly: on any processor, or on those with vnni "
            "instructions or ARM's alone, which leaves 8 bits to every weight."
        ),
    ] = "any",
    recipe: Annotated[Path | None, typer.Option(help="Recipe file; the one used is saved in the artifact.")] = None,
    weights: options.Weights = None,
    task: options.TaskName = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    train: options.Train = None,
    task_option: options.TaskOption = None,
    dtype: options.Dtype = None,
    batch: options.Batch = None,
    timing_seconds: options.TimingSeconds = None,
    seed: options.Seed = 0,
    threads: options.Threads = 1,
    overwrite: options.Overwrite = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read and compress a checkpoint larger than memory block by block; it is not evaluated.",
        ),
    ] = False,
    exit_code: options.ExitCode = False,
    json: options.Json = False,
) -> None:
    """Make a model smaller under a budget, and prove what it cost."""
    if stream and exit_code:
        raise InputError("--exit-code reports the verdict, and --stream gives none; leave one of them out")
    spec = ModelSpec(model, weights, options.dtype_named(dtype))
    place = Output(output, overwrite)
    chosen = task_data(task, data, calibration, task_option, train)
    choices = Choices(
        budget=Budget(size, ratio, bits, drop, coded, num_states),
        recipe=Recipe.from_file(recipe) if recipe else None,
        formats=with_method(format or [], method),
        rules=parse_rules(rule or []),
        exclude=exclude or [],
        transforms=transform or [],
        bias_correction=bias_correction,
        float_layers=parse_keep_float(keep_float),
        seed=seed,
        cpu=cpu,
    )
    if stream:
        with events(json, on_step=show_block) as listener:
            manifest = compress_streamed(spec, place, chosen, choices, listener)
        if json:
            print_json({"output": str(output), **manifest})
        else:
            show_streamed(output, manifest)
        return
    with events(json, on_trial=show_trial) as listener:
        result = compress_model(spec, place, chosen, choices, options.timing(batch, threads, timing_seconds), listener)
    if json:
        print_json({"output": str(result.output), **result.manifest})
    else:
        show(result)
    assert result.verdict is not None
    leave(result.verdict.outcome, exit_code)


def with_method(formats: list[str], method: str | None) -> list[str]:
    """`--method hqq --format int4-g64-asym` is short for `--format hqq:int4-g64-asym`."""
    if method is None:
        return formats
    if not formats:
        raise InputError(f"--method {method} needs the --format it fills, such as --format int4-g64")
    return [text if text == KEEP else f"{method}:{text}" for text in formats]


def parse_rules(texts: list[str]) -> dict[str, str]:
    """Parse `--rule` flags into a dict of pattern to scheme; a pattern given twice takes its last place and scheme."""
    rules: dict[str, str] = {}
    for pattern, scheme in map(parse_rule, texts):
        rules.pop(pattern, None)
        rules[pattern] = scheme
    return rules


def parse_rule(text: str) -> tuple[str, str]:
    """Parse `PATTERN=SCHEME` into a pair."""
    pattern, equals, scheme = text.partition("=")
    if not equals or not pattern or not scheme:
        raise InputError(f"--rule '{text}' is not PATTERN=SCHEME; write for example '*.embeddings.*=int8-g32'")
    return pattern, scheme


def parse_keep_float(text: str) -> str | int:
    """Parse `--keep-float`: `auto`, `none` or a number of layers."""
    if text in ("auto", "none"):
        return text
    if not text.isdecimal():
        raise InputError(f"--keep-float '{text}' is not auto, none or a number of sites")
    return int(text)


def show_block(done: int, total: int) -> None:
    """Print a line for a block that was written."""
    err.print(f"block {done}/{total}", highlight=False)


def show_trial(trial: Trial) -> None:
    """Print a line for a trial of a search that has finished."""
    err.print(f"trial: {megabytes(trial.num_bytes)}, {trial.verdict.sentence()}", markup=False, highlight=False)


def show_streamed(output: Path, manifest: dict[str, Any]) -> None:
    """Print the result of a streamed run (sizes only; no evaluation)."""
    before, after = manifest["source"]["bytes"], manifest["files"][weights_name(manifest)]["bytes"]
    out.print(
        f"weights file: {megabytes(before)} to {megabytes(after)}, {before / after:.2f}x smaller", highlight=False
    )
    out.print(f"artifact: {output}  (load it with tersor.load)", markup=False, highlight=False)


def show(outcome: Result) -> None:
    """Print the result as tables."""
    assert outcome.verdict is not None
    original, compressed = outcome.scorecards
    if outcome.trials:
        rows = [(megabytes(t.num_bytes), f"{t.score:.4f}", t.verdict.outcome) for t in outcome.trials]
        print_table("trials of the search", ["weights file", original.metric, "verdict"], rows)
    print_table("before and after", ["", "original", "compressed"], comparison(original, compressed))
    for hint in hints(original, compressed, outcome.sites):
        out.print(hint, markup=False, highlight=False)
    out.print(f"measured on: {outcome.task}", markup=False, highlight=False)
    if outcome.limit:
        share = compressed.file_bytes / outcome.limit.num_bytes
        out.print(
            f"budget: {outcome.limit.text} = {megabytes(outcome.limit.num_bytes)}; used {share:.2%}", highlight=False
        )
    out.print(f"verdict: {outcome.verdict.sentence()}", style="bold", markup=False, highlight=False)
    out.print(
        f"artifact: {outcome.output}  (load it with tersor.load; recipe.yaml and tersor.json say how it was made)",
        markup=False,
        highlight=False,
    )
