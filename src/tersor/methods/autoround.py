"""AutoRound: learn the rounding by signed gradient descent on a block's output (Cheng et al. 2023, SignRound,
https://arxiv.org/abs/2309.05516).

Every weight may be pushed by up to half a step before it is rounded, and every scale may move; both follow the sign of
the gradient of the squared error between the block's output and the original's, over minibatches of calibration data,
with a step size that falls linearly to zero. Here the descent starts from the codes that `gptq` found, so it moves a
quarter as fast as the paper's, which starts from the nearest ones. What stays is the start, the end or the point half
way, whichever is best over all the data. The block sees the inputs that the model compressed so far gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.core.errors import InputError
from tersor.formats.contract import Encoded, Params, Weight
from tersor.formats.int_group import IntGroup
from tersor.methods.contract import BlockRun, MethodFor
from tersor.methods.gptq import Gptq
from tersor.methods.stats import Stats

EDGE = 0.49  # how far from its code a weight may start, in steps
SHARES = (1.0, 0.5)  # of the way that the descent went: points to choose from


@dataclass(frozen=True)
class AutoRound(MethodFor[IntGroup]):
    """Learn rounding and scales of all sites of a block together.

    Attributes:
        num_steps: of signed gradient descent.
        batch_size: examples a step.
        rate: how fast roundings move: the first step is `rate / num_steps` of the grid's, all together half of `rate`.
        scale_rate: step size of the scales, as a fraction of the roundings'.
        damping, upstream_correction, num_rounds: of `gptq`, where it starts.
    """

    num_steps: int = 100
    batch_size: int = 4
    rate: float = 0.25
    scale_rate: float = 0.1
    damping: float = 0.01
    upstream_correction: float = 1.0
    num_rounds: int | None = None

    name = "autoround"
    fills = IntGroup
    refusal = "learns integer codes, and {format} has none; use int4-g64"
    needs = frozenset({"second_moment", "cross_moment"})

    def __post_init__(self) -> None:
        if not (self.num_steps >= 0 and self.batch_size > 0 and self.rate >= 0 and self.scale_rate >= 0):
            raise InputError(f"{self}: num_steps, rate and scale_rate must be 0 or more, and batch_size above 0")
        Gptq(self.damping, self.upstream_correction, self.num_rounds)

    def fill(self, weight: Weight, format: IntGroup, stats: Stats) -> Encoded:
        """The codes that GPTQ finds: the start of the descent, and the result for a site outside the blocks."""
        return Gptq(self.damping, self.upstream_correction, self.num_rounds).compress(weight, format, stats)

    def tune(self, weights: Mapping[str, Weight], starts: Mapping[str, Encoded], run: BlockRun) -> dict[str, Encoded]:
        """Better codes and scales for the sites of one block, or those it started with if none were found.

        Args:
            weights: the original weights by site.
            starts: what `compress` made of them.
            run: runs the block on given weights.
        """
        rounded = {name: LearnedRounding(weights[name], encoded) for name, encoded in starts.items()}
        generator = torch.Generator().manual_seed(0)
        for step in range(self.num_steps):
            rate = self.rate * (1 - step / self.num_steps) / self.num_steps
            examples = torch.randperm(run.num_examples, generator=generator)[: self.batch_size]
            with torch.enable_grad():
                output, target = run({name: r.weight() for name, r in rounded.items()}, examples)
                loss = (output.float() - target.float()).square().mean()
                leaves = [leaf for r in rounded.values() for leaf in (r.push, r.growth)]
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for r, push, growth in zip(rounded.values(), gradients[::2], gradients[1::2], strict=True):
                if push is None or growth is None:  # an expert that none of these examples reaches
                    continue
                r.push.data.sub_(push.sign(), alpha=rate).clamp_(-0.5, 0.5)
                r.growth.data.sub_(growth.sign(), alpha=rate * self.scale_rate).clamp_(-0.5, 0.5)
        points = [dict(starts), *({name: r.encoded(share) for name, r in rounded.items()} for share in SHARES)]
        return min(points, key=lambda point: self.loss(run, point))

    def loss(self, run: BlockRun, point: Mapping[str, Encoded]) -> float:
        """The squared error of the block's output, over all examples."""
        weights = {name: encoded.decode() for name, encoded in point.items()}
        total = 0.0
        with torch.no_grad():
            for part in torch.arange(run.num_examples).split(self.batch_size):
                output, target = run(weights, part)
                total += (output.float() - target.float()).square().sum().item()
        return total


class LearnedRounding:
    """A weight on an integer grid, with what is learned about it.

    Attributes:
        push: what is added to each weight before it is rounded, in steps `[out, in]`.
        growth: how much each scale grows, as a fraction `[out, groups]`.
    """

    def __init__(self, weight: Weight, encoded: Encoded):
        assert isinstance(encoded.format, IntGroup)
        self.format = encoded.format
        self.params: Params = {name: part for name, part in encoded.parts.items() if name != "codes"}
        codes = self.format.quantize(encoded.decode(), self.params)
        steps = self.format.grouped(weight) / self.format.divisor(self.params["scale"]).unsqueeze(-1)
        places = (steps + self.format.zero_point(self.params)).flatten(1)[:, : weight.shape[1]]
        self.places = codes + (places - codes).clamp(-EDGE, EDGE)
        self.push = torch.zeros_like(self.places, requires_grad=True)
        self.growth = torch.zeros_like(self.params["scale"], dtype=torch.float32, requires_grad=True)

    def codes(self, share: float = 1.0) -> Float[Tensor, "out in"]:
        """The codes: rounded in the forward pass, with a straight-through gradient; `share` scales the push."""
        lowest = 1 if self.format.bits == 8 and self.format.symmetric else 0
        pushed = (self.places + share * self.push).clamp(lowest, 2**self.format.bits - 1)
        return pushed + (pushed.detach().round() - pushed.detach())

    def weight(self) -> Weight:
        scale = (self.params["scale"].float() * (1 + self.growth)).unsqueeze(-1)
        codes = self.codes()
        values = (self.format.grouped(codes) - self.format.zero_point(self.params)) * scale
        return values.flatten(1)[:, : codes.shape[1]]

    def encoded(self, share: float = 1.0) -> Encoded:
        with torch.no_grad():
            scale = self.params["scale"].float() * (1 + share * self.growth)
            params = {**self.params, "scale": self.format.storable(scale)}
            return self.format.encode(self.format.dequantize(self.codes(share), params), params)
