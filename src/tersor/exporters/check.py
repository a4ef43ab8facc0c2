"""Check of an exported file: opened in its own runtime, run on the examples, compared with the model, and timed.

A language model with a cache reads the beginnings of some texts at once and the rest token by token; its logits are
held against those of the model that reads whole texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError, TersorError
from tersor.core.messages import first_line
from tersor.core.threads import threads
from tersor.exporters.contract import Checkpoint, Runnable, Written
from tersor.exporters.decoder import NUM_NEW
from tersor.exporters.examples import Examples
from tersor.measure.latency import Latency, measure_calls
from tersor.runtimes import Decoder, Decodes, Session, runtime_named
from tersor.runtimes.exactness import exactness
from tersor.runtimes.torch_decoder import TorchDecoder
from tersor.tasks.inputs import scoring

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
FLOAT = {"fp32": 1e-3, "fp16": 2e-2}  # relative difference that the order of float operations explains
CHAOS = 2.0  # two runs whose inputs are rounded differ by the rounding of both
ROUNDED = 0.25  # where the runtime rounds inputs in its own way, and at most wherever inputs are rounded
SECONDS = 2.0  # of timing


@dataclass(frozen=True)
class Check:
    """The result of running an exported file beside the model it was made from.

    Attributes:
        runtime: name and version.
        difference: `|file - model| / |model|` of the outputs; of several outputs, the largest.
        input_rounding: the same between the model and one with its weights and float inputs: cost of rounding inputs.
        latency: latency of the file at one row, in turn with the next in one process.
        float_latency: of the same model with decoded weights and float inputs in the same runtime; of the model in
            PyTorch, where nothing is quantized.
        against: which of these two was timed, in words.
        row: the input that was timed, such as `one input of 1x16`.
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
    """Compare a file with the model as `check` does, raising the runtime's own errors."""
    runtime, examples = runtime_named(export.runtime), checkpoint.need_examples()
    if examples.texts is not None:
        return decode_and_compare(export, checkpoint, written.file or output, written, num_threads)
    dtype = getattr(export, "dtype", "fp32")
    files = (written.file or output, written.as_float)
    session, as_float = (runtime.open(path, num_threads=num_threads) for path in files)
    batches = judged(examples)
    feeds = [as_arrays(batch.cast(DTYPES[dtype])) for batch in batches]
    model = [batch.run(checkpoint.model.float()) for batch in batches]

    def differs(session: Session) -> float:
        return max(difference(session.run(feed), made) for feed, made in zip(feeds, model, strict=True))

    input_rounding = differs(as_float)
    limit = limit_of(dtype, input_rounding)
    if written.exact is not None:
        exact = differs(runtime.open(written.exact, num_threads=num_threads))
        hold(exact, limit, f"{export.name}, with inputs rounded as in the artifact", input_rounding, file=written.exact)
        limit = ROUNDED
    found = differs(session)
    per_token = shares_a_scale(export, checkpoint)
    hold(found, limit, export.name, input_rounding, file=files[0], per_token=per_token)
    one = one_row(examples, feeds[0])
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


def decode_and_compare(
    export: Runnable, checkpoint: Checkpoint, file: Path, written: Written, num_threads: int
) -> Check:
    """Compare a language model that has a cache with the file's decoder, and time one token."""
    runtime, examples = runtime_named(export.runtime), checkpoint.need_examples()
    assert isinstance(runtime, Decodes)
    assert examples.texts is not None
    ids, mask = (tensor.numpy() for tensor in examples.texts)
    dtype = getattr(export, "dtype", "fp32")
    model = read_whole(checkpoint.model.float(), ids, mask)

    def found_by(path: Path) -> tuple[Decoder, float]:
        decoder = runtime.open_decoder(path, num_threads=num_threads)
        return decoder, difference({"logits": read_in_steps(decoder, ids, mask)}, {"logits": model})

    as_float, input_rounding = found_by(written.as_float)
    if not any(packed.activation for packed in checkpoint.sites):  # nothing rounds inputs
        hold(input_rounding, FLOAT[dtype], f"{export.name}, with decoded weights", 0.0)
    limit = limit_of(dtype, input_rounding)
    if written.exact is not None:
        exact = found_by(written.exact)[1]
        hold(exact, limit, f"{export.name}, with inputs rounded as in the artifact", input_rounding, file=written.exact)
        limit = ROUNDED
    decoder, found = found_by(file)
    hold(found, limit, export.name, input_rounding, file=file)
    in_torch: Decoder = TorchDecoder(checkpoint.model.to(DTYPES[dtype]), "model", num_threads)
    as_it_was, against = (as_float, "decoded to float") if checkpoint.sites else (in_torch, "in PyTorch")
    longest = ids[mask.sum(1).argmax()][None]
    for each in (as_it_was, decoder):
        each.reset()
        each.feed(longest)
    calls = [partial(each.feed, longest[:, -1:]) for each in (as_it_was, decoder)]
    with threads(num_threads):
        float_latency, latency = measure_calls(calls, batch_size=1, num_threads=num_threads, seconds=SECONDS)
    row = f"one token after {longest.shape[1]} others"
    return Check(runtime.version(), found, input_rounding, latency, float_latency, against, row)


def read_whole(model: nn.Module, ids: np.ndarray, mask: np.ndarray) -> Tensor:
    """The model's logits, without a cache; zero at padding."""
    decoder = TorchDecoder(model, "model", torch.get_num_threads())
    return torch.from_numpy(decoder.feed(ids, mask) * mask[:, :, None])


def read_in_steps(decoder: Decoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of texts whose last tokens are read one by one; see `read_whole`."""
    decoder.reset()
    first = ids.shape[1] - NUM_NEW
    made = [decoder.feed(ids[:, :first], mask[:, :first])]
    made += [decoder.feed(ids[:, i : i + 1], mask[:, i : i + 1]) for i in range(first, ids.shape[1])]
    return np.concatenate(made, axis=1) * mask[:, :, None]


def judged(examples: Examples) -> list[Examples]:
    """The examples, and as many rows of the calibration data: what the fixed scales of inputs were made for."""
    num_rows = len(next(iter(examples.inputs.values())))
    more = [{name: t[:num_rows] for name, t in batch.items()} for batch in examples.calibration[:1]]
    whole = [rows for rows in more if all(len(t) == num_rows for t in rows.values())]
    return [examples, *(replace(examples, inputs=rows) for rows in whole)]


def limit_of(dtype: str, input_rounding: float) -> float:
    """The largest difference that outputs may have: never more than `ROUNDED`, whatever rounding inputs does."""
    return min(FLOAT[dtype] + CHAOS * input_rounding, ROUNDED)


def shares_a_scale(export: Runnable, checkpoint: Checkpoint) -> bool:
    """True if int8-dynamic inputs have one scale for all tokens in the file, where `--per-token` gives each its own."""
    dynamic = any(p.activation is not None and p.activation.format == "int8-dynamic" for p in checkpoint.sites)
    return dynamic and getattr(export, "per_token", None) is False


def hold(
    found: float,
    limit: float,
    what: str,
    input_rounding: float,
    *,
    file: Path | None = None,
    per_token: bool = False,
) -> None:
    """Raises ModelError where the outputs of `file` differ by more than `limit`, with the reason: products that
    overflow on this processor, inputs that rounding does not suit, or layers that it does not; `per_token`: a scale for
    each token may help."""
    if found <= limit:
        return
    text = f"{what}: the file's outputs differ from the model's by {found:.2%} where at most {limit:.2%} is explained "
    known = exactness(file) if file is not None else None
    if known is not None and not known.is_exact:
        raise ModelError(f"{text}by rounding; nothing was written. {known}")
    if CHAOS * input_rounding > ROUNDED:
        raise ModelError(
            f"{text}by rounding; nothing was written. On these inputs rounding alone moves the model's own outputs by "
            f"{input_rounding:.2%}: give inputs like those that it was calibrated on with --data, or compress again "
            f"with int8-dynamic inputs"
        )
    try_first = "Try --per-token, or leave" if per_token else "Leave"
    raise ModelError(f"{text}by rounding; nothing was written. {try_first} single layers float with --rule 'NAME=keep'")


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
    """Example inputs as NumPy arrays, which a session is fed."""
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in examples.inputs.items()}


def one_row(examples: Examples, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds cut to their first row, if the batch may have any size."""
    return {n: array[:1] if "batch" in examples.axes[n].values() else array for n, array in feeds.items()}
