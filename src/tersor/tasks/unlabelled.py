"""Opening `fidelity`: which unlabelled examples suit a model.

.npz                        x (or x_test; x_train calibrates) for a model that takes one array; without x, the model's
                            inputs by name (input_ids, pixel_values, ...), one row an example
folder of images            for a model that takes images
text (.txt, .csv, .jsonl)   windows for a language model, texts for a classifier or an encoder
nothing                     the docstrings of the Python standard library; images and sound are made up

A model of images and texts gets both: what is not given is made up.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int, Shaped

from tersor.core.errors import DataError
from tersor.tasks.arrays import Numbers, check_same_shape, examples, find_name, open_arrays, read_npz
from tersor.tasks.contract import Output
from tersor.tasks.encoder import tokenize
from tersor.tasks.fidelity import Fidelity
from tersor.tasks.images import find_images, open_images
from tersor.tasks.inputs import Inputs
from tersor.tasks.judged import Asked, Calls, Judged
from tersor.tasks.several import Sizes, open_made_up, open_named, open_pairs
from tersor.tasks.source import DataSource
from tersor.tasks.split import Rows, choose, split_rows
from tersor.tasks.table import is_table, read_texts
from tersor.tasks.takes import architecture_of, refuse_encoder_decoder, takes
from tersor.tasks.text import fingerprint, fingerprint_texts, read_text, standard_library_docstrings
from tersor.tasks.windows import open_windows

MAX_EXAMPLES = 512
MAX_POSITIONS = 16_384
MAX_LOGIT_BYTES = 2**31  # float16
MODES = {  # how the end of an architecture's name in config.json tells what the model makes of text
    "ForCausalLM": "windows",
    "LMHeadModel": "windows",
    "ForConditionalGeneration": "windows",
    "ForSequenceClassification": "text logits",
    "ForTokenClassification": "token logits",
    "ForMaskedLM": "token logits",
}

Example = TypeVar("Example", str, Path)
Opened = tuple[Inputs, Rows, str, int]  # inputs, split, how they are read, default batch size


def open_fidelity(
    source: DataSource,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    image_size: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    output: Output | None = None,
    field: str | int | None = None,
    class_axis: int | None = None,
    max_examples: int = MAX_EXAMPLES,
    calibration_examples: int = 128,
) -> Fidelity:
    """Read unlabelled arrays, images or texts, or fall back to standard-library docstrings and made-up inputs."""
    data = source.data
    limits = {"max_examples": max_examples, "calibration_examples": calibration_examples}
    asked = Asked(output, None if field is None else str(field), class_axis)
    if data is not None and not data.exists():
        raise DataError(f"{data}: no such file or folder")
    refuse_encoder_decoder(source.config, "fidelity")
    pixels = {"image_size": image_size, "mean": mean, "std": std}
    wanted = takes(source.config)
    is_array = data is not None and data.suffix.lower() == ".npz"
    if is_array or wanted != "text" or (data is not None and data.is_dir()):
        opened = _open_tensors(source, limits, asked, pixels, max_length)
    elif source.tokenizer is None and data is None:
        raise DataError(
            "no data, and this model has no tokenizer for the fallback text; give data: .npz with x, a folder of "
            "images, or your own task as package.module:factory"
        )
    elif reading_mode(source) == "windows":
        opened = _open_windows(source, limits, context, max_tokens)
    else:
        opened = _open_texts(source, limits, reading_mode(source), max_length, asked)
    inputs, rows, how, default_batch = opened
    made = wanted != "text" and data is None
    fallback = "made-up examples" if made else "docstrings of the Python standard library"
    name = f"{fallback} (no data was given)" if data is None else data.name
    mark = fingerprint_texts([*standard_library_docstrings(), how] if made else standard_library_docstrings())
    mark = mark if data is None else fingerprint(data)
    return Fidelity(inputs, rows, f"fidelity on {name}: {rows.description}; {how}", mark, batch_size or default_batch)


def reading_mode(source: DataSource) -> str:
    """`windows`, `text logits`, `token logits`, `embedding` or, for heads of any other kind, `any`, from the
    configuration's architecture."""
    architecture = architecture_of(source.config)
    other = "any" if "For" in architecture else "embedding"
    return next((mode for ending, mode in MODES.items() if architecture.endswith(ending)), other)


def fit_memory(rows: Rows, lengths: Int[np.ndarray, " example"], source: DataSource) -> Rows:
    """A random subset for evaluation, where all token logits would not fit what `fidelity` keeps; at least one."""
    vocab = getattr(source.config, "vocab_size", None) or 1
    most = min(MAX_POSITIONS, MAX_LOGIT_BYTES // (2 * vocab))
    fitting = max(1, int((np.cumsum(lengths[rows.eval]) <= most).sum()))
    if fitting >= len(rows.eval):
        return rows
    note = f"{rows.description}, of which {fitting:,} are evaluated (about {most:,} positions fit in memory)"
    kept = rows.eval[choose(len(rows.eval), fitting)]
    return replace(rows, eval=kept, description=note)


def _open_tensors(
    source: DataSource, limits: dict[str, int], asked: Asked, pixels: dict[str, Any], max_length: int | None
) -> Opened:
    """Arrays, images, images with texts, or made-up examples, for a model that may return anything."""
    data, wanted = source.data, takes(source.config)
    inputs: Calls
    how: str
    if data is not None and data.suffix.lower() == ".npz":
        inputs, sizes, unit, how, batch_size = _arrays(source, pixels)
    elif wanted == "images and text":
        inputs, how = open_pairs(source, max_length, pixels)
        sizes, unit, batch_size = (len(inputs), 0, 0), "pairs", 32
    elif data is not None and data.is_dir():
        paths, sizes = _with_others(find_images(data), source, find_images)
        inputs = images = open_images(paths, source, **pixels)
        unit, how, batch_size = "images", images.description, 128
    elif data is not None:
        raise DataError(f"{data}: this model takes {wanted}, and the data is text; give a folder of images or .npz")
    else:
        inputs, how = open_made_up(source, wanted, pixels)
        sizes, unit, batch_size = (len(inputs), 0, 0), "examples", 32
    return Judged(inputs, asked), split(sizes, source, limits, unit), how, batch_size


def _arrays(source: DataSource, pixels: dict[str, Any]) -> tuple[Calls, Sizes, str, str, int]:
    """The arrays of a file: `x`, or the model's inputs by name."""
    assert source.data is not None
    if not {"x", "x_test"} & read_npz(source.data).keys():
        inputs, sizes = open_named(source)
        return inputs, sizes, "rows", f"inputs {', '.join(inputs.arrays)}", 32
    parts, sizes = _read_arrays(source.data, source)
    arrays = open_arrays(parts, source, pixels["mean"], pixels["std"])
    return arrays, sizes, "rows", arrays.description, 128


def _open_windows(source: DataSource, limits: dict[str, int], context: int | None, max_tokens: int | None) -> Opened:
    calibration = None if source.calibration is None else _whole_text(source.calibration)
    train = None if source.train is None else _whole_text(source.train)
    inputs, rows = open_windows(
        _whole_text(source.data),
        source,
        context=context,
        max_tokens=max_tokens,
        calibration_text=calibration,
        train_text=train,
        **limits,
    )
    width = inputs.ids.shape[1]
    rows = fit_memory(rows, np.full(len(inputs), width, dtype=np.int64), source)
    return inputs, rows, f"context {width}, no special tokens", 4


def _open_texts(source: DataSource, limits: dict[str, int], mode: str, max_length: int | None, asked: Asked) -> Opened:
    texts, sizes = _with_others(_texts(source.data), source, read_texts)
    inputs = tokenize(texts, source, max_length=max_length, embedding=mode == "embedding")
    rows = split(sizes, source, limits, "texts")
    if mode == "token logits":
        rows = fit_memory(rows, inputs.lengths, source)
    judged: Inputs = Judged(inputs, asked) if mode == "any" or asked != Asked() else inputs
    return judged, rows, inputs.description, 32


def split(sizes: Sizes, source: DataSource, limits: dict[str, int], unit: str) -> Rows:
    """Split rows that stand in the order data, calibration, training; arrays may bring the last as `x_train`."""
    train_name = source.train_name or "x_train"
    return split_rows(*sizes, unit=unit, separate=source.calibration_name, train_name=train_name, **limits)


def _with_others(
    items: list[Example], source: DataSource, read: Callable[[Path], list[Example]]
) -> tuple[list[Example], Sizes]:
    """The data's items followed by those for calibration and for training, and how many there are of each."""
    others = [read(path) if path is not None else [] for path in (source.calibration, source.train)]
    return items + others[0] + others[1], (len(items), len(others[0]), len(others[1]))


def _read_arrays(data: Path, source: DataSource) -> tuple[tuple[Shaped[np.ndarray, " _ *shape"], ...], Sizes]:
    """Inputs for evaluation, for calibration and for training, and how many there are of each."""
    arrays = read_npz(data)
    x = examples(data, arrays, find_name(data, arrays, ("x_test", "x")))
    parts = [x, x[:0], x[:0]]
    for place, path in ((1, source.calibration), (2, source.train)):
        if path is not None:
            others = read_npz(path)
            parts[place] = examples(path, others, find_name(path, others, ("x_train", "x", "x_test")))
            check_same_shape(path, (x, parts[place]))
    if "x_train" in arrays and source.train is None:
        parts[2] = examples(data, arrays, "x_train")
        check_same_shape(data, (x, parts[2]))
    return tuple(part for part in parts if len(part)), (len(x), len(parts[1]), len(parts[2]))


def _texts(path: Path | None) -> list[str]:
    return list(standard_library_docstrings()) if path is None else read_texts(path)


def _whole_text(path: Path | None) -> str:
    """A plain text as it stands; a table's texts as paragraphs."""
    if path is None or is_table(path):
        return "\n\n".join(_texts(path))
    return read_text(path)
