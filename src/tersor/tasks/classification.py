"""Classification: arrays, image folders or texts with labels; the metric is accuracy.

data.npz                    x, y or x_test, y_test, and optionally x_train, y_train (which then train and calibrate)
folder/class_name/*.png     classes in sorted order, or by the model's label2id
data.csv (.tsv, .jsonl)     text,label; or any columns with a header naming text (or sentence) and label
train.txt                   passages without labels, to distil from a teacher alone
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tersor.core.errors import DataError, InputError
from tersor.tasks.arrays import Arrays, Numbers, check_same_shape, examples, find_name, open_arrays, read_npz
from tersor.tasks.augment import augmented, check_augment
from tersor.tasks.contract import Output, Split
from tersor.tasks.encoder import Texts, tokenize
from tersor.tasks.images import find_images, open_images
from tersor.tasks.inputs import Batch, Inputs, batches, epoch, scatter, scoring
from tersor.tasks.labels import Label, class_numbers
from tersor.tasks.outputs import check_classes, one_class_each
from tersor.tasks.scores import METRICS, Scores
from tersor.tasks.source import DataSource
from tersor.tasks.split import Rows, split_rows
from tersor.tasks.table import is_table, read_rows, read_texts
from tersor.tasks.text import fingerprint

COLUMNS = {"text": ("text", "sentence"), "label": ("label",)}
Sizes = tuple[int, int, int]  # examples of the data, for calibration, for training
EXPECTED = ".npz arrays, a folder of class_name/image.png, or a csv, tsv or jsonl file with text,label"


@dataclass(frozen=True, eq=False)
class Classification:
    """Labelled examples; a row is 1 where the largest logit is the label's, else 0.

    Attributes:
        labels: class numbers, -1 for calibration examples without one, `[example]`.
        augment: what is done to images in training: `flip`, `shift` (augment.py).
    """

    inputs: Inputs
    labels: Int[np.ndarray, " example"]
    rows: Rows
    description: str
    fingerprint: str
    batch_size: int
    name: str = "classification"
    output: Output = "logits"
    augment: tuple[str, ...] = ()

    @property
    def num_train(self) -> int:
        return len(self.rows.train)

    def prepare(self, original: nn.Module) -> None:
        """Do nothing: the labels come with the data."""

    def epoch(self, seed: int, batch_size: int | None = None) -> Iterator[Batch]:
        """The train split in an order drawn from `seed`, images augmented."""
        size = self.batch_size if batch_size is None else batch_size
        for number, batch in enumerate(epoch(self.inputs, self.rows.train, size, seed)):
            yield augmented(batch, self.augment, (seed, number)) if self.augment else batch

    def loss(self, output: Float[Tensor, "row class_"], batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats."""
        labels = self.labels[batch.rows]
        if (labels < 0).any():
            raise DataError("the train split has examples without a label: label them, or distil from a teacher alone")
        check_classes(output, max(2, int(self.labels.max()) + 1))
        return cross_entropy(output.float(), torch.from_numpy(labels).to(output.device))

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Batch]:
        """The split's examples (32 texts or 128 images at a time); `labels[batch.rows]` are theirs."""
        return batches(self.inputs, self.rows[split], self.batch_size if batch_size is None else batch_size)

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, "row class_"]:
        """The logits of a batch."""
        return one_class_each(self.inputs.forward(model, batch))

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        """Rows of one column, 1 correct or 0 wrong, in the order of the data."""
        rows = self.rows[split]
        if (self.labels[rows] < 0).any():
            raise InputError(f"the {split} split was read without labels; score the eval split")
        pieces = []
        with scoring(model):
            for batch in self.batches(split):
                logits = self.forward(model, batch)
                check_classes(logits, max(2, int(self.labels.max()) + 1))
                predicted = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).cpu().numpy()
                pieces.append((batch.rows, (predicted == self.labels[batch.rows]).astype(np.float64)))
        return Scores(METRICS["accuracy"], scatter(pieces, rows)[:, None])


def open_classification(
    source: DataSource,
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    image_size: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    augment: str | tuple[str, ...] = (),
    max_examples: int | None = None,
    calibration_examples: int = 128,
) -> Classification:
    """Read labelled arrays, images or texts; `mean` and `std` are on the [0, 1] scale."""
    data = source.need_data("classification", EXPECTED)
    inputs: Inputs
    if data.is_dir():
        paths, labels, sizes = _read_folder(data, source)
        inputs = images = open_images(paths, source, image_size=image_size, mean=mean, std=std)
        unit, how, default_batch = "images", images.description, 128
    elif data.suffix.lower() == ".npz":
        parts, labels, sizes = _read_arrays(data, source)
        inputs = arrays = open_arrays(parts, source, mean, std)
        unit, how, default_batch = "rows", arrays.description, 128
    else:
        texts, labels, sizes = _read_texts(data, source)
        inputs = tokenized = tokenize(texts, source, max_length=max_length, embedding=False)
        unit, how, default_batch = "rows", tokenized.description, 32
    numbers, note = class_numbers(labels, source.config, numeric=not data.is_dir())
    rows = split_rows(
        *sizes,
        calibration_examples=calibration_examples,
        max_examples=max_examples,
        unit=unit,
        separate=source.calibration_name or "x_train",
        train_name=source.train_name or "x_train",
    )
    description = "; ".join(filter(None, [f"classification on {data.name}: {rows.description}", how, note]))
    chosen = check_augment((augment,) if isinstance(augment, str) else augment, isinstance(inputs, Texts))
    size = batch_size or default_batch
    return Classification(inputs, numbers, rows, description, fingerprint(data), size, augment=chosen)


def _read_folder(data: Path, source: DataSource) -> tuple[list[Path], list[Label], Sizes]:
    paths = find_images(data)
    labels = [Label(_class_of(path, data), str(path)) for path in paths]
    extra: list[Path] = []
    train: list[Path] = []
    for folder in filter(None, (source.calibration, source.train)):
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder of images, as the data is one")
    if source.calibration is not None:
        extra = find_images(source.calibration)
        labels += [Label(None, str(path)) for path in extra]
    if source.train is not None:
        train = find_images(source.train)
        labels += [Label(_class_of(path, source.train), str(path)) for path in train]
    return paths + extra + train, labels, (len(paths), len(extra), len(train))


def _class_of(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).parts
    if len(parts) < 2:
        raise DataError(f"{path}: lies in no class folder; expected {folder.name}/class_name/{path.name}")
    return parts[0]


def _read_arrays(data: Path, source: DataSource) -> tuple[tuple[np.ndarray, ...], list[Label], Sizes]:
    """Input arrays (data, then calibration, then training), and labels for all their rows."""
    arrays = read_npz(data)
    x, labels = _labelled_arrays(data, arrays, ("x_test", "x"))
    parts, extra = [x], x[:0]
    if source.calibration is not None:
        others = read_npz(source.calibration)
        extra = examples(source.calibration, others, find_name(source.calibration, others, ("x_train", "x", "x_test")))
        check_same_shape(source.calibration, (x, extra))
        labels = labels + [Label(None, str(source.calibration))] * len(extra)
    elif "x_train" in arrays and "y_train" not in arrays and source.train is None:
        extra = examples(data, arrays, "x_train")
        check_same_shape(data, (x, extra))
        labels = labels + [Label(None, str(data))] * len(extra)
    train, train_labels = x[:0], list[Label]()
    if source.train is not None:
        train, train_labels = _labelled_arrays(source.train, read_npz(source.train), ("x_train", "x"))
        check_same_shape(source.train, (x, train))
    elif {"x_train", "y_train"} <= set(arrays):
        train, train_labels = _labelled_arrays(data, arrays, ("x_train",))
        check_same_shape(data, (x, train))
    parts += [part for part in (extra, train) if len(part)]
    return tuple(parts), labels + train_labels, (len(x), len(extra), len(train))


def _labelled_arrays(path: Path, arrays: Arrays, names: tuple[str, ...]) -> tuple[np.ndarray, list[Label]]:
    """The first of some arrays that there is, and its labels: `y` for `x`."""
    x_name = find_name(path, arrays, names)
    x = examples(path, arrays, x_name)
    y_name = find_name(path, arrays, (x_name.replace("x", "y"),))
    return x, _array_labels(path, arrays[y_name], y_name, len(x))


def _array_labels(path: Path, y: np.ndarray, name: str, num: int) -> list[Label]:
    if y.shape not in ((num,), (num, 1)):
        raise DataError(
            f"{path}: '{name}' has shape {list(y.shape)}; expected [{num}], one class per example "
            f"(of one-hot rows take y.argmax(1))"
        )
    y = y.reshape(num)
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.floor(y)).all():
        y = y.astype(np.int64)
    if y.dtype.kind not in "biuU":
        raise DataError(f"{path}: '{name}' is of type {y.dtype}; expected class numbers from 0 or class names")
    if y.dtype.kind != "U" and y.min() < 0:
        raise DataError(f"{path}: '{name}' holds {y.min()} at index {y.argmin()}; expected class numbers from 0")
    texts = y.astype(np.int64).astype(str) if y.dtype.kind != "U" else y
    return [Label(str(text), f"{path}, {name}[{i}]") for i, text in enumerate(texts)]


def _read_texts(data: Path, source: DataSource) -> tuple[list[str], list[Label], Sizes]:
    source.need_tokenizer(str(data))
    texts, labels = _labelled_texts(data)
    num, extra, train = len(texts), list[str](), list[str]()
    if source.calibration is not None:
        extra = read_texts(source.calibration)
        labels += [Label(None, str(source.calibration))] * len(extra)
    if source.train is not None:
        train, train_labels = _labelled_texts(source.train) if is_table(source.train) else _unlabelled(source.train)
        labels += train_labels
    return texts + extra + train, labels, (num, len(extra), len(train))


def _unlabelled(path: Path) -> tuple[list[str], list[Label]]:
    """Passages of a plain text, for training that needs no labels."""
    texts = read_texts(path)
    return texts, [Label(None, str(path))] * len(texts)


def _labelled_texts(path: Path) -> tuple[list[str], list[Label]]:
    if not is_table(path):
        raise DataError(f"{path}: plain text has no labels; expected {EXPECTED}")
    rows = read_rows(path, COLUMNS)
    labels = [Label(row.cells["label"].strip(), f"{path}, line {row.line}") for row in rows]
    return [row.cells["text"] for row in rows], labels
