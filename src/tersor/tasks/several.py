"""Models of several inputs, or of inputs that no text gives: arrays by name, images with texts, made-up examples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersor.core.errors import DataError
from tersor.tasks import made_up
from tersor.tasks.arrays import ArrayInputs, Arrays, NamedArrays, examples, open_arrays, read_npz, run_model
from tersor.tasks.contract import Output
from tersor.tasks.encoder import tokenize
from tersor.tasks.images import find_images, open_images
from tersor.tasks.inputs import Batch, Inputs, consecutive
from tersor.tasks.outputs import logits_of
from tersor.tasks.source import DataSource
from tersor.tasks.split import RowNumbers
from tersor.tasks.table import read_texts
from tersor.tasks.takes import IMAGES, Takes, part_of
from tersor.tasks.text import standard_library_docstrings

NUM_MADE_UP = 256
SIDE = 224  # of made-up images where the configuration says nothing
Sizes = tuple[int, int, int]  # examples of the data, for calibration, for training


@dataclass(frozen=True, eq=False)
class Together:
    """Several kinds of inputs of the same examples, as one call's arguments."""

    parts: tuple[Inputs, ...]

    @property
    def output(self) -> Output:
        return "logits"

    def __len__(self) -> int:
        return min(len(part) for part in self.parts)

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        return consecutive(rows, batch_size)

    def batch(self, rows: RowNumbers) -> Batch:
        """The arguments of every part, merged by name."""
        inputs = {name: each for part in self.parts for name, each in part.batch(rows).inputs.items()}
        return Batch(rows, {IMAGES if name == "x" else name: each for name, each in inputs.items()})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch."""
        return run_model(model, batch)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits as the model returns them."""
        return logits_of(self.call(model, batch))


def open_named(source: DataSource) -> tuple[NamedArrays, Sizes]:
    """The arrays of an `.npz` under the names of the model's arguments, and how many rows there are of each kind."""
    found: list[Arrays] = []
    for path in (source.data, source.calibration, source.train):
        found.append({} if path is None else named_arrays(path))
    names = list(found[0])
    for path, arrays in zip((source.calibration, source.train), found[1:], strict=True):
        if arrays and [(n, a.shape[1:]) for n, a in arrays.items()] != [(n, found[0][n].shape[1:]) for n in names]:
            raise DataError(f"{path}: holds {', '.join(arrays)}; expected {', '.join(names)} of the data's shapes")
    joined = {name: np.concatenate([arrays[name] for arrays in found if arrays]) for name in names}
    counts = [len(next(iter(arrays.values()))) if arrays else 0 for arrays in found]
    return NamedArrays(joined), (counts[0], counts[1], counts[2])


def named_arrays(path: Path) -> Arrays:
    """All arrays of a file, each with one row an example."""
    arrays = {name: examples(path, {name: array}, name) for name, array in read_npz(path).items()}
    if not arrays:
        raise DataError(f"{path}: holds no arrays; expected x, or the model's inputs by name (np.savez(path, x=x))")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{path}: no array x, and arrays of unlike numbers of examples: {listed}")
    return arrays


def open_pairs(source: DataSource, max_length: int | None, pixels: dict[str, Any]) -> tuple[Together, str]:
    """Images with texts: those of the data, and made-up ones or docstrings beside them."""
    for path in (source.calibration, source.train):
        if path is not None:
            raise DataError(f"{path}: a model of images and texts reads both from --data; leave it out")
    texts = list(standard_library_docstrings())
    images: Inputs
    if source.data is not None and source.data.is_dir():
        images = open_images(find_images(source.data), source, **pixels)
        description = f"images of {source.data.name}, texts from the Python standard library"
    else:
        texts = texts if source.data is None else read_texts(source.data)
        images = made_up_images(source, min(len(texts), NUM_MADE_UP), pixels)
        description = "made-up images"
    num = min(len(texts), len(images))
    tokens = tokenize(texts[:num], source, max_length=max_length, embedding=False)
    return Together((tokens, images)), f"{description}; {tokens.description}"


def made_up_images(source: DataSource, num: int, pixels: dict[str, Any]) -> ArrayInputs:
    """Made-up images of the size that the configuration names."""
    vision = part_of(source.config, "vision_config")
    size = pixels.get("image_size") or getattr(vision, "image_size", None) or SIDE
    height, width = size if isinstance(size, tuple | list) else (size, size)
    drawn = made_up.images(num, height, width, getattr(vision, "num_channels", None) or 3)
    return open_arrays((drawn,), source, pixels.get("mean"), pixels.get("std"))


def open_made_up(source: DataSource, kind: Takes, pixels: dict[str, Any]) -> tuple[ArrayInputs | NamedArrays, str]:
    """Made-up examples of what the model takes."""
    config = source.config
    if kind == "images":
        return made_up_images(source, NUM_MADE_UP, pixels), "made-up images"
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None)
    if bands is not None:
        frames = getattr(config, "max_length", None) or 256
        name = "input_values" if kind == "waves" else "input_features"
        return NamedArrays({name: made_up.spectrograms(NUM_MADE_UP, frames, bands)}), "made-up spectrograms"
    if kind == "features":
        raise DataError("this model takes input_features, of a size that its configuration does not say; give .npz")
    drawn = made_up.waves(NUM_MADE_UP)
    if getattr(config, "audio_channels", None):
        drawn = np.repeat(drawn[:, None], config.audio_channels, axis=1)
    return NamedArrays({"input_values": drawn}), "made-up sound, 1 s at 16 kHz"
