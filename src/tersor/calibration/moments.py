"""Statistics of a site's inputs over the calibration data: second moments, means, ranges and a sample.

Sums are kept in float32 and divided once at the end; inputs are taken a few thousand at a time.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.activations.histogram import Histogram
from tersor.methods.stats import Stats
from tersor.nn.packed import PackedLinear, PackedProjection
from tersor.nn.sites import Site, is_convolution, is_linear

CHUNK = 2**12  # inputs at a time, and in a run whose range is noted
STRIP = 192  # rows of the second moment at a time
SAMPLE = 512  # inputs kept
PIECE = 256  # inputs whose products are summed in one go: a library parts longer sums among its threads
PATCHES = 2**24  # numbers of unfolded convolution inputs at a time


class Moments:
    """Running sums over the inputs of one site (or of several that share an input).

    Args:
        needs: the fields of `Stats` to gather; what is not asked for costs nothing.
        seed: of the sample.
        groups: every one of them takes its turn in the inputs, row after row, and gets a mean of its own.
    """

    def __init__(self, num_features: int, needs: frozenset[str], seed: int = 0, groups: int = 1):
        self.needs, self.groups = needs, groups
        self.num_tokens = 0
        self.second = torch.zeros(num_features, num_features) if "second_moment" in needs else None
        self.gap: Tensor | None = None
        self.sum = torch.zeros(groups, num_features, dtype=torch.float64)
        self.largest = torch.zeros(num_features)
        self.sample: Tensor | None = None
        self.sample_keys = torch.empty(0)
        self.ranges: list[Tensor] = []
        self.histogram = Histogram() if "histogram" in needs else None
        self.generator = torch.Generator().manual_seed(seed)

    def add(
        self,
        x: Float[Tensor, "token in"],
        original: Float[Tensor, "token in"] | None = None,
    ) -> None:
        """Add inputs to the sums; `original` are the same tokens' inputs in the original model."""
        size = max(1, CHUNK // self.groups) * self.groups
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            self.add_part(x[part], None if original is None else original[part])

    def add_part(self, x: Tensor, original: Tensor | None) -> None:
        self.num_tokens += len(x)
        wide = x.float()
        self.sum += wide.unflatten(0, (-1, self.groups)).sum(0).double().cpu()
        self.largest = torch.maximum(self.largest, wide.abs().amax(0).cpu())
        if "sample" in self.needs:
            self.keep_sample(wide)
        if "ranges" in self.needs:
            self.ranges.append(torch.stack(wide.aminmax()).cpu())
        if self.histogram is not None:
            self.histogram.add(wide)
        if self.second is not None:
            self.second = self.second.to(x.device)
            exact = x if x.dtype is torch.bfloat16 and x.device.type == "cpu" else wide
            add_square(self.second, exact)
        if original is not None and "cross_moment" in self.needs:
            self.gap = wide.new_zeros(wide.shape[1], wide.shape[1]) if self.gap is None else self.gap
            for piece, gap in zip(wide.split(PIECE), (original.float() - wide).split(PIECE), strict=True):
                self.gap.addmm_(gap.t(), piece)

    def keep_sample(self, x: Tensor) -> None:
        """Keep a uniform sample without replacement: every input draws a random key, and the smallest keys stay."""
        keys = torch.cat([self.sample_keys, torch.rand(len(x), generator=self.generator)])
        rows = x.cpu() if self.sample is None else torch.cat([self.sample, x.cpu()])
        kept = keys.argsort()[:SAMPLE].sort().values
        self.sample, self.sample_keys = rows[kept].clone(), keys[kept]

    def stats(self) -> Stats:
        """The averages over all inputs so far; an empty `Stats` if there were none."""
        if not self.num_tokens:
            return Stats()
        second = None if self.second is None else mirrored(self.second / self.num_tokens)
        cross = second + self.gap / self.num_tokens if second is not None and self.gap is not None else None
        return Stats(
            second_moment=second,
            cross_moment=cross,
            mean=(self.sum * self.groups / self.num_tokens).float().squeeze(0),
            largest=self.largest,
            sample=self.sample,
            ranges=torch.stack(self.ranges) if self.ranges else None,
            histogram=self.histogram.table() if self.histogram is not None else None,
            num_tokens=self.num_tokens,
        )


def add_square(total: Float[Tensor, "in in"], x: Float[Tensor, "token in"]) -> None:
    """Add `x' x` to the lower triangle of `total`, and little beyond it: that takes not much more than half the time.

    Products of bfloat16 are summed in float32 but rounded to bfloat16 in the end; a second product gives what the
    rounding left out, and both together still take half the time of one in float32.
    """
    num_features = x.shape[1]
    for start in range(0, num_features, STRIP):
        stop = min(start + STRIP, num_features)
        left, right, strip = x[:, start:stop].t(), x[:, :stop], total[start:stop, :stop]
        if x.dtype is not torch.bfloat16:
            for piece in range(0, len(x), PIECE):
                strip.addmm_(left[:, piece : piece + PIECE], right[piece : piece + PIECE])
            continue
        rough = left @ right
        strip.add_(rough).add_(torch.addmm(rough.neg(), left, right))


def mirrored(lower: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).t()


def groups_of(module: nn.Module) -> int:
    """The number of groups of a convolution, each with rows of its own; 1 for all other modules."""
    return int(module.groups) if is_convolution(module) else 1  # type: ignore[arg-type]


def takes_inputs(module: nn.Module) -> bool:
    """True if the inputs of a module are what its weight is multiplied with."""
    packed = isinstance(module, PackedLinear) and not isinstance(module, PackedProjection)
    return packed or is_linear(module) or is_convolution(module)


def has_inputs(model: nn.Module, site: Site) -> bool:
    """True if a pass can show what a site's matrix is multiplied with."""
    return any(takes_inputs(model.get_submodule(place.module)) for place in site.owners)


def shows_inputs(model: nn.Module, site: Site) -> bool:
    """True if every use of a site's weight is a product with inputs that a hook can see. An embedding that is tied to a
    head is also looked up, so it is none."""
    return all(takes_inputs(model.get_submodule(place.module)) for place in site.owners)


def inputs_of(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Iterator[Float[Tensor, "token in"]]:
    """Yields the rows that the site's matrix is multiplied with, in pieces; nothing where they are not known.

    Args:
        mask: which positions `[example, position]` are real, for inputs `[example, position, in]`.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        x = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
        widening = torch.Size(module.kernel_size).numel() * x[:1].numel()
        for part in x.split(max(1, PATCHES // widening)):
            yield patches(module, part)
    elif x.ndim >= 2 and x.is_floating_point():
        masked = mask is not None and x.ndim > 2 and x.shape[:2] == mask.shape
        yield x[mask.bool()] if masked and mask is not None else x.flatten(0, -2)


def patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Float[Tensor, "token in"]:
    """The unfolded inputs of a convolution `[positions * groups, channels / groups * kernel]`."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # [example, channel, positions..., kernel...] -> [example, positions..., group, channel of the group, kernel...]
    num_axes = len(conv.kernel_size)
    x = x.unflatten(1, (conv.groups, -1))
    x = x.permute(0, *range(3, 3 + num_axes), 1, 2, *range(3 + num_axes, 3 + 2 * num_axes))
    return x.reshape(-1, conv.in_channels // conv.groups * torch.Size(conv.kernel_size).numel())
