"""Opening `fidelity`: which unlabelled examples suit a model.

.npz                        x (or x_test; x_train calibrates) for a model that takes one array
folder of pictures          for a model that takes images
text (.txt, .csv, .jsonl)   windows for a language model, texts for a classifier or an encoder
nothing                     the docstrings of the Python standard library
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int, Shaped

from tersor.errors import DataError, InputError
from tersor.tasks.arrays import ArrayInputs, Numbers, check_same_shape, examples, find_name, read_npz
from tersor.tasks.encoder import MAX_LENGTH, tokenize
from tersor.tasks.fidelity import Fidelity
from tersor.tasks.images import find_images, open_images
from tersor.tasks.inputs import Inputs
from tersor.tasks.source import Source
from tersor.tasks.split import Rows, choose, split_rows
from tersor.tasks.table import is_table, read_texts
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
Sizes = tuple[int, int, int]  # examples of the data, for calibration, for training
Opened = tuple[Inputs, Rows, str, int]  # inputs, split, how they are read, default batch size


def open_fidelity(
    source: Source,
    *,
    batch_size: int | None = None,
    max_length: int = MAX_LENGTH,
    context: int | None = None,
    max_tokens: int | None = None,
    image_size: int | None = None,
    mean: Numbers = 0.0,
    std: Numbers = 1.0,
    max_examples: int = MAX_EXAMPLES,
    calibration_examples: int = 128,
) -> Fidelity:
    """Read unlabelled arrays, pictures or texts, or fall back to standard-library docstrings."""
    data = source.data
    limits = {"max_examples": max_examples, "calibration_examples": calibration_examples}
    if data is not None and not data.exists():
        raise DataError(f"{data}: no such file or folder")
    if data is not None and data.is_dir():
        opened = _open_pictures(data, source, limits, image_size, mean, std)
    elif data is not None and data.suffix.lower() == ".npz":
        opened = _open_arrays(data, source, limits, mean, std)
    elif source.tokenizer is None and data is None:
        raise DataError(
            "no data, and this model has no tokenizer for the fallback text; give data: .npz with x, a folder of "
            "pictures, or your own task as package.module:factory"
        )
    elif reading_mode(source) == "windows":
        opened = _open_windows(source, limits, context, max_tokens)
    else:
        opened = _open_texts(source, limits, reading_mode(source), max_length)
    inputs, rows, how, default_batch = opened
    name = "docstrings of the Python standard library (no data was given)" if data is None else data.name
    mark = fingerprint_texts(standard_library_docstrings()) if data is None else fingerprint(data)
    return Fidelity(inputs, rows, f"fidelity on {name}: {rows.description}; {how}", mark, batch_size or default_batch)


def reading_mode(source: Source) -> str:
    """`windows`, `text logits`, `token logits` or `embedding`, from the configuration's architecture."""
    if getattr(source.config, "is_encoder_decoder", False):
        raise InputError(
            "fidelity cannot feed an encoder-decoder model, which also needs decoder inputs; write your own task and "
            "name it package.module:factory"
        )
    architecture = (getattr(source.config, "architectures", None) or [""])[0]
    return next((mode for ending, mode in MODES.items() if architecture.endswith(ending)), "embedding")


def fit_memory(rows: Rows, lengths: Int[np.ndarray, " example"], source: Source) -> Rows:
    """A random subset for evaluation, where all token logits would not fit what `fidelity` keeps; at least one."""
    vocab = getattr(source.config, "vocab_size", None) or 1
    most = min(MAX_POSITIONS, MAX_LOGIT_BYTES // (2 * vocab))
    fitting = max(1, int((np.cumsum(lengths[rows.eval]) <= most).sum()))
    if fitting >= len(rows.eval):
        return rows
    note = f"{rows.description}, of which {fitting:,} are evaluated (about {most:,} positions fit in memory)"
    kept = rows.eval[choose(len(rows.eval), fitting)]
    return replace(rows, eval=kept, description=note)


def _open_pictures(
    data: Path, source: Source, limits: dict[str, int], image_size: int | None, mean: Numbers, std: Numbers
) -> Opened:
    paths, sizes = _with_others(find_images(data), source, find_images)
    inputs = open_images(paths, image_size=image_size, mean=mean, std=std)
    rows = split(sizes, source, limits, "pictures")
    return inputs, rows, f"size {image_size}" if image_size else "size as stored", 128


def _open_arrays(data: Path, source: Source, limits: dict[str, int], mean: Numbers, std: Numbers) -> Opened:
    parts, sizes = _read_arrays(data, source)
    return ArrayInputs(parts, mean, std), split(sizes, source, limits, "rows"), f"shape {list(parts[0].shape[1:])}", 128


def _open_windows(source: Source, limits: dict[str, int], context: int | None, max_tokens: int | None) -> Opened:
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


def _open_texts(source: Source, limits: dict[str, int], mode: str, max_length: int) -> Opened:
    texts, sizes = _with_others(_texts(source.data), source, read_texts)
    inputs = tokenize(texts, source, max_length=max_length, embedding=mode == "embedding")
    rows = split(sizes, source, limits, "texts")
    if mode == "token logits":
        rows = fit_memory(rows, inputs.lengths, source)
    return inputs, rows, inputs.description, 32


def split(sizes: Sizes, source: Source, limits: dict[str, int], unit: str) -> Rows:
    """Split rows that stand in the order data, calibration, training; arrays may bring the last as `x_train`."""
    train_name = source.train_name or "x_train"
    return split_rows(*sizes, unit=unit, separate=source.calibration_name, train_name=train_name, **limits)


def _with_others(
    items: list[Example], source: Source, read: Callable[[Path], list[Example]]
) -> tuple[list[Example], Sizes]:
    """The data's items followed by those for calibration and for training, and how many there are of each."""
    others = [read(path) if path is not None else [] for path in (source.calibration, source.train)]
    return items + others[0] + others[1], (len(items), len(others[0]), len(others[1]))


def _read_arrays(data: Path, source: Source) -> tuple[tuple[Shaped[np.ndarray, " _ *shape"], ...], Sizes]:
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
