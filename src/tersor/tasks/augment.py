"""Images made a little different each time they are trained on.

flip     mirrored left to right, every second one
shift    moved by up to an eighth of the side, zeros coming in (He et al. 2015, https://arxiv.org/abs/1512.03385: 4 of
         32 pixels)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from tersor.core.errors import DataError, InputError
from tersor.tasks.inputs import Batch

Images = Float[Tensor, "row channel height width"]


def flip(x: Images, generator: torch.Generator) -> Images:
    """Mirror every image left to right with probability one half."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)


def shift(x: Images, generator: torch.Generator) -> Images:
    """Every image moved by its own whole number of pixels in both directions."""
    height, width = x.shape[-2:]
    most = (max(1, height // 8), max(1, width // 8))
    padded = pad(x, (most[1], most[1], most[0], most[0]))
    top, left = (torch.randint(0, 2 * side + 1, (len(x), 1), generator=generator) for side in most)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    each = torch.arange(len(x)).view(-1, 1, 1)
    return padded.transpose(0, 1)[:, each, rows.unsqueeze(-1), columns.unsqueeze(1)].transpose(0, 1).contiguous()


AUGMENTATIONS: dict[str, Callable[[Images, torch.Generator], Images]] = {"flip": flip, "shift": shift}


def check_augment(names: Sequence[str], is_text: bool) -> tuple[str, ...]:
    """Raises InputError for an unknown name, or for texts."""
    for name in names:
        if name not in AUGMENTATIONS:
            raise InputError(
                f"option augment is '{name}'; expected {' or '.join(AUGMENTATIONS)}, or both as flip,shift"
            )
    if names and is_text:
        raise InputError("option augment is for images, and the data is text; leave it out")
    return tuple(names)


def augmented(batch: Batch, names: Sequence[str], seed: tuple[int, int]) -> Batch:
    """The batch with every augmentation done to its images, drawn from `seed` (of the epoch, and its batch)."""
    place = "pixel_values" if "pixel_values" in batch.inputs else "x"
    x = batch.inputs[place]
    if x.ndim != 4:
        raise DataError(f"option augment needs images [row, channel, height, width], and x is {list(x.shape)}")
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    for name in names:
        x = AUGMENTATIONS[name](x, generator)
    return replace(batch, inputs={**batch.inputs, place: x})
