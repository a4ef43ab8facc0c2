"""Image folders: `class_name/image.png`, opened when they are needed.

The shorter side is resized to `image_size` (bilinear), the centre square is cropped, and values are scaled to [0, 1],
then `(x - mean) / std`. The first image decides between grey and RGB for all. Where the model's folder has an image
processor, that one does it all instead, but for what the user's options say (processor.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import DataError, MissingExtra
from tersor.tasks.arrays import UNREADABLE, Numbers, normalise, run_model, to_model_layout
from tersor.tasks.contract import Output
from tersor.tasks.inputs import Batch, consecutive
from tersor.tasks.outputs import logits_of
from tersor.tasks.processor import Processor, read_processor
from tersor.tasks.source import DataSource
from tersor.tasks.split import RowNumbers
from tersor.tasks.takes import part_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
GREY = ("1", "L", "LA")
DEEP = ("I", "I;16", "I;16B", "F")  # more than 8 bits: a conversion would clip them silently


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Image files and how they become `x [row, channel, height, width]`."""

    paths: tuple[Path, ...]
    mode: str
    image_size: int | None = None
    mean: Numbers = 0.0
    std: Numbers = 1.0
    processor: Processor | None = None

    @property
    def description(self) -> str:
        if self.processor is not None and self.image_size is None:
            return self.processor.description
        return f"size {self.image_size}" if self.image_size else "size as stored"

    @property
    def output(self) -> Output:
        return "logits"

    def __len__(self) -> int:
        return len(self.paths)

    def chunks(self, rows: RowNumbers, batch_size: int) -> list[RowNumbers]:
        return consecutive(rows, batch_size)

    def batch(self, rows: RowNumbers) -> Batch:
        """`x [row, channel, height, width]`, float32; or what the model's processor makes, by name."""
        images = [read_image(self.paths[row], self.mode, self.image_size) for row in rows]
        if self.processor is not None:
            return Batch(rows, self.processor(images))
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self.paths[row]}: {image.shape[0]} x {image.shape[1]} pixels, others have "
                    f"{images[0].shape[0]} x {images[0].shape[1]}; give one size to all (option image_size=224)"
                )
        return Batch(rows, {"x": normalise(to_model_layout(np.stack(images)), self.mean, self.std)})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output for a batch."""
        return run_model(model, batch)

    def forward(self, model: nn.Module, batch: Batch) -> Float[Tensor, " row *rest"]:
        """Logits as the model returns them."""
        return logits_of(self.call(model, batch))


def open_images(
    paths: list[Path],
    source: DataSource,
    *,
    image_size: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> ImageInputs:
    """Images by path, as the model's own processor wants them; without one the first says whether they are grey."""
    pil = import_pil()
    try:
        with pil.open(paths[0]) as image:
            stored = image.mode
    except (*UNREADABLE, pil.DecompressionBombError) as error:
        raise DataError(f"{paths[0]}: not a readable image ({error})") from None
    if stored in DEEP:
        raise DataError(f"{paths[0]}: more than 8 bits a channel (mode {stored}); use 8-bit images or .npz arrays")
    processor = read_processor(source.model_folder, image_size, mean, std)
    mode = "L" if stored in GREY else "RGB"
    if processor is not None:
        mode = "L" if getattr(part_of(source.config, "vision_config"), "num_channels", 3) == 1 else "RGB"
    shift, scale = 0.0 if mean is None else mean, 1.0 if std is None else std
    return ImageInputs(tuple(paths), mode, image_size, shift, scale, processor)


def find_images(folder: Path) -> list[Path]:
    """Images anywhere under a folder, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(SUFFIXES)}) in it; expected class_name/image.png")
    return paths


def read_image(path: Path, mode: str, size: int | None) -> np.ndarray:
    """One image as uint8 `[height, width, channel]`."""
    pil = import_pil()
    try:
        with pil.open(path) as opened:
            image = opened.convert(mode)
    except (*UNREADABLE, pil.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from None
    if size is not None:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), pil.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def import_pil() -> Any:
    """PIL's Image module. Raises MissingExtra with the pip command that installs it."""
    try:
        import PIL.Image
    except ImportError:
        raise MissingExtra("vision", "reading an image folder") from None
    return PIL.Image
