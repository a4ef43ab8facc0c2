"""Is what was written the model? It is opened in its own runtime, run on the examples, compared, and timed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.checkpoint.source import first_line
from tersor.errors import ModelError, TersorError
from tersor.export.contract import Checkpoint, Runnable, Written
from tersor.export.examples import Examples
from tersor.measure.latency import Latency, measure_calls, threads
from tersor.runtimes import runtime_named
from tersor.tasks.inputs import scoring

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
FLOAT = {"fp32": 1e-3, "fp16": 2e-2}  # relative difference that the order of float operations explains
CHAOS = 2.0  # two runs whose inputs are rounded differ by the rounding of both
ROUNDED = 0.5  # at most, where the runtime rounds inputs in its own way
SECONDS = 2.0  # of timing


@dataclass(frozen=True)
class Check:
    """What running the file showed.

    Attributes:
        runtime: with its version.
        difference: of the file's outputs from the model's own, `|file - model| / |model|`; the worst output.
        input_rounding: the same, of the model from one with these weights and float inputs: what rounding inputs costs.
        latency: of the file at one row, in turn with the next in one process.
        float_latency: of the same model with decoded weights and float inputs in the same runtime; of the model in
            PyTorch, where nothing is quantized.
        against: which of the two.
        row: what the latencies are of, such as `one input of 1x16`.
    """

    runtime: str
    difference: float
    input_rounding: float
    latency: Latency
    float_latency: Latency
    against: str
    row: str


def check(export: Runnable, checkpoint: Checkpoint, output: Path, written: Written, num_threads: int = 1) -> Check:
    """Run the file and its companions. Raises ModelError where the outputs are not the model's."""
    try:
        return run_and_compare(export, checkpoint, output, written, num_threads)
    except TersorError:
        raise
    except Exception as error:  # the runtimes' errors have no common base of their own
        raise ModelError(
            f"{export.name}: what was written does not run ({first_line(error)}); please report it"
        ) from None


def run_and_compare(
    export: Runnable, checkpoint: Checkpoint, output: Path, written: Written, num_threads: int
) -> Check:
    """As `check`, with the runtime's own errors."""
    runtime, examples = runtime_named(export.runtime), checkpoint.need_examples()
    dtype = getattr(export, "dtype", "fp32")
    model = examples.run(checkpoint.model.float())
    feeds = as_arrays(examples.cast(DTYPES[dtype]))
    files = (written.file or output, written.as_float)
    session, as_float = (runtime.open(path, num_threads=num_threads) for path in files)
    made = session.run(feeds)
    input_rounding = difference(as_float.run(feeds), model)
    limit = FLOAT[dtype] + CHAOS * input_rounding
    if written.exact is not None:
        exact = difference(runtime.open(written.exact, num_threads=num_threads).run(feeds), model)
        hold(exact, limit, f"{export.name}, with inputs rounded as in the artifact")
        limit = max(limit, ROUNDED)
    found = difference(made, model)
    hold(found, limit, export.name)
    one = one_row(examples, feeds)
    tensors = {name: torch.from_numpy(array) for name, array in one.items()}

    def in_torch() -> None:
        with scoring(checkpoint.model):
            examples.call(checkpoint.model, tensors)

    as_it_was = (lambda: as_float.run(one)) if checkpoint.sites else in_torch
    against = "decoded to float" if checkpoint.sites else "in PyTorch"
    if not checkpoint.sites:
        checkpoint.model.to(DTYPES[dtype])
    with threads(num_threads):
        calls = [as_it_was, lambda: session.run(one)]
        float_latency, latency = measure_calls(calls, batch_size=1, num_threads=num_threads, seconds=SECONDS)
    shape = "x".join(map(str, next(iter(one.values())).shape))
    row = f"one input of {shape}"
    return Check(runtime.version(), found, input_rounding, latency, float_latency, against, row)


def hold(found: float, limit: float, what: str) -> None:
    """Raises ModelError where outputs differ by more than `limit`."""
    if not found <= limit:
        raise ModelError(
            f"{what}: the file's outputs differ from the model's by {found:.2%} where at most {limit:.2%} is explained "
            f"by rounding; nothing was written. Try --per-token, or leave single layers float with --rule 'NAME=keep'"
        )


def difference(made: Mapping[str, np.ndarray], model: Mapping[str, Tensor]) -> float:
    """`|made - model| / |model|` of the worst output; infinite where one is missing, misshapen or not finite."""
    worst = 0.0
    for name, tensor in model.items():
        expected = tensor.double().numpy()
        found = made.get(name)
        if found is None or found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        length = float(np.linalg.norm(expected)) or 1.0
        worst = max(worst, float(np.linalg.norm(found - expected)) / length)
    return worst


def as_arrays(examples: Examples) -> dict[str, np.ndarray]:
    """What a session is fed."""
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in examples.inputs.items()}


def one_row(examples: Examples, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first row, where any number of rows will do."""
    return {n: array[:1] if "batch" in examples.axes[n].values() else array for n, array in feeds.items()}
