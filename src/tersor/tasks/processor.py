"""Preparation of images by the image processor in a Hugging Face model's own folder.

Size, crop, resampling, order of channels, scale, mean and standard deviation are all in `preprocessor_config.json` (or
`processor_config.json`), and transformers' processor does what they say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tersor.core.errors import DataError, MissingExtra
from tersor.core.messages import first_line

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, eq=False)
class Processor:
    """A folder's processor, and what the user's options change of it.

    Attributes:
        own: transformers' image processor.
        changes: its arguments that the user's options stand for.
    """

    own: Any
    changes: dict[str, Any]

    @property
    def description(self) -> str:
        """A description of the processing in a few words."""
        given = {name: getattr(self.own, name, None) for name in ("size", "crop_size", "image_mean", "image_std")}
        crop = "crop_size" if getattr(self.own, "do_center_crop", None) else "size"
        sides = [side for side in dict(given[crop] or given["size"] or {}).values() if side]
        size = " x ".join(map(str, dict.fromkeys(sides)))
        return f"images as the model's own processor makes them ({type(self.own).__name__}, size {size})"

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """The model's inputs of uint8 images `[height, width, channel]`."""
        options = {"return_tensors": "pt", "input_data_format": "channels_last", **self.changes}
        try:
            made = dict(self.own(images=list(images), **options))
        except Exception as error:  # a processor's settings may trip over anything
            sizes = list(images[0].shape)
            raise DataError(
                f"the model's image processor cannot take images of {sizes}: {first_line(error)}; give others, or "
                f"arrays (.npz) that the model takes as they are"
            ) from None
        return {name: each for name, each in made.items() if isinstance(each, Tensor)}


def read_processor(
    folder: Path | None, image_size: int | None = None, mean: Any = None, std: Any = None
) -> Processor | None:
    """The image processor of a model folder; None where there is none.

    `image_size`, `mean` and `std` take the place of what it says: images then come in that size.
    """
    if folder is None or not any((Path(folder) / name).is_file() for name in FILES):
        return None
    from transformers import AutoImageProcessor

    try:
        own = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:
        raise MissingExtra("vision", "preparing images") from None
    except Exception as error:  # whatever a damaged file trips over
        raise DataError(f"{folder}: the image processor cannot be read ({first_line(error)})") from None
    changes: dict[str, Any] = {}
    if image_size is not None:
        changes |= {"do_resize": False, "do_center_crop": False}
    for name, value in (("image_mean", mean), ("image_std", std)):
        if value is not None:
            changes[name] = list(value) if isinstance(value, tuple) else value
    return Processor(own, changes)
