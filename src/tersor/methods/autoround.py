"""AutoRound: learn the rounding by signed gradient descent on a block's output (Cheng et al. 2023, SignRound,
https://arxiv.org/abs/2309.05516).

Every weight may be pushed by up to half a step before it is rounded, and every scale may move; both follow the sign of
the gradient of the squared error between the block's output and the original's, over minibatches of calibration data,
with a step size that falls linearly to zero. Here the descent starts from the codes that `gptq` found, and the block
sees the inputs that the model compressed so far gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersor.encoded import Encoded
from tersor.errors import InputError
from tersor.formats.contract import Format, Params, Weight
from tersor.formats.int_group import IntGroup
from tersor.methods.contract import BlockRun
from tersor.methods.gptq import Gptq
from tersor.stats import Stats

EDGE = 0.49  # how far from its code a weight may start, in steps


@dataclass(frozen=True)
class AutoRound:
    """Learn rounding and scales of all sites of a block together.

    Attributes:
        num_steps: of signed gradient descent.
        batch_size: examples a step.
        scale_rate: step size of the scales, as a fraction of the roundings' `1 / num_steps`.
        damping, drift, num_rounds: of `gptq`, where it starts.
    """

    num_steps: int = 100
    batch_size: int = 4
    scale_rate: float = 0.1
    damping: float = 0.01
    drift: float = 1.0
    num_rounds: int | None = None

    name = "autoround"
    needs = frozenset({"second_moment", "cross_moment"})

    def __post_init__(self) -> None:
        if not (self.num_steps >= 0 and self.batch_size > 0 and self.scale_rate >= 0):
            raise InputError(f"{self}: num_steps and scale_rate must be 0 or more, and batch_size above 0")
        Gptq(self.damping, self.drift, self.num_rounds)

    def accepts(self, format: Format) -> str | None:
        if isinstance(format, IntGroup):
            return None
        return f"autoround learns integer codes, and {format.name} has none; use int4-g64"

    def compress(self, weight: Weight, format: Format, stats: Stats) -> Encoded:
        """Where the descent starts; all there is for a site outside the blocks."""
        return Gptq(self.damping, self.drift, self.num_rounds).compress(weight, format, stats)

    def tune(self, weights: Mapping[str, Weight], starts: Mapping[str, Encoded], run: BlockRun) -> dict[str, Encoded]:
        """Better codes and scales for the sites of one block, or those it started with if none were found.

        Args:
            weights: the original weights by site.
            starts: what `compress` made of them.
            run: runs the block on given weights.
        """
        rounded = {name: Rounded(weights[name], encoded) for name, encoded in starts.items()}
        generator = torch.Generator().manual_seed(0)
        everything = torch.arange(run.num_examples)
        before = self.loss(run, {name: r.weight() for name, r in rounded.items()}, everything)
        for step in range(self.num_steps):
            rate = (1 - step / self.num_steps) / self.num_steps
            examples = torch.randperm(run.num_examples, generator=generator)[: self.batch_size]
            with torch.enable_grad():
                output, target = run({name: r.weight() for name, r in rounded.items()}, examples)
                loss = (output.float() - target.float()).square().mean()
                leaves = [leaf for r in rounded.values() for leaf in (r.push, r.growth)]
                gradients = torch.autograd.grad(loss, leaves)
            for r, push, growth in zip(rounded.values(), gradients[::2], gradients[1::2], strict=True):
                r.push.data.sub_(push.sign(), alpha=rate).clamp_(-0.5, 0.5)
                r.growth.data.sub_(growth.sign(), alpha=rate * self.scale_rate).clamp_(-0.5, 0.5)
        tuned = {name: r.encoded() for name, r in rounded.items()}
        after = self.loss(run, {name: encoded.decode() for name, encoded in tuned.items()}, everything)
        return tuned if after < before else dict(starts)

    def loss(self, run: BlockRun, weights: Mapping[str, Weight], examples: Tensor) -> float:
        """The squared error of the block's output, over all examples."""
        total = 0.0
        with torch.no_grad():
            for part in examples.split(self.batch_size):
                output, target = run(weights, part)
                total += (output.float() - target.float()).square().sum().item()
        return total


class Rounded:
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

    def codes(self) -> Float[Tensor, "out in"]:
        """Rounded on the way forward, straight through on the way back."""
        lowest = 1 if self.format.bits == 8 and self.format.symmetric else 0
        pushed = (self.places + self.push).clamp(lowest, 2**self.format.bits - 1)
        return pushed + (pushed.detach().round() - pushed.detach())

    def weight(self) -> Weight:
        scale = (self.params["scale"].float() * (1 + self.growth)).unsqueeze(-1)
        codes = self.codes()
        values = (self.format.grouped(codes) - self.format.zero_point(self.params)) * scale
        return values.flatten(1)[:, : codes.shape[1]]

    def encoded(self) -> Encoded:
        with torch.no_grad():
            params = {**self.params, "scale": self.format.storable(self.params["scale"].float() * (1 + self.growth))}
            return self.format.encode(self.format.dequantize(self.codes(), params), params)
