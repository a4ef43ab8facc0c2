"""Activation formats: quantization of a layer's input each time the layer runs.

A weight's format says what is stored; an activation format says what the arithmetic sees: one class each, with `fit`
choosing its parameters from calibration and `fake_quantize` giving the reference result that every kernel is judged
against. Dynamic formats take a scale from every token when the site runs; static ones keep the scale that calibration
chose. As a method chooses a point of a weight's format, an observer (observers/) chooses the range of static integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from tersor.activations.observers import Observer
from tersor.activations.observers.least_error import CubedError, LeastSquares
from tersor.core.errors import InputError, UnknownName
from tersor.methods.stats import Stats


@dataclass(frozen=True, eq=False)
class Activation:
    """An input quantizer at one site: the format's name and its parameters.

    `params` holds static scales and zero points; it is empty when they are computed from each input.
    """

    format: str
    params: dict[str, Tensor] = field(default_factory=dict)

    def fake_quantize(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return ACTIVATIONS[self.format].fake_quantize(x, self.params)


@runtime_checkable
class ActivationFormat(Protocol):
    """The contract of an activation format: how the inputs of a layer are quantized."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    layout: ClassVar[Mapping[str, torch.dtype]]  # of the static parameters; readers check files against it

    def fit(self, stats: Stats) -> dict[str, Tensor]:
        """Static parameters from calibration, each of shape `[1]`; empty for dynamic formats."""

    def fake_quantize(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        """The values the arithmetic stands for: quantized, then dequantized."""


@dataclass(frozen=True)
class Int8Dynamic:
    """Symmetric int8 with one scale per token, taken from the token itself when the site runs.

    A token's result does not depend on what else is in the batch
    (Dettmers et al. 2022, vector-wise quantization, https://arxiv.org/abs/2208.07339).
    """

    name = "int8-dynamic"
    needs = frozenset[str]()
    layout: ClassVar[Mapping[str, torch.dtype]] = {}

    def fit(self, stats: Stats) -> dict[str, Tensor]:
        return {}

    def quantize(self, x: Float[Tensor, "*batch in"]) -> tuple[Int8[Tensor, "*batch in"], Float[Tensor, "*batch 1"]]:
        """Quantize inputs: codes in -127..127, and the float32 scale of each token."""
        x = x.float()
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12).div_(127)
        return (x / scale).round_().to(torch.int8), scale

    def fake_quantize(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        codes, scale = self.quantize(x)
        return (codes * scale).to(x.dtype)


@dataclass(frozen=True)
class IntStatic:
    """Asymmetric integers with one scale and zero point for all tokens (Jacob et al. 2017,
    https://arxiv.org/abs/1712.05877). Codes lie in `-2**(bits-1) .. 2**(bits-1) - 1`; inputs of one sign, as after a
    ReLU, get all of them.

    An observer chooses the range: `cubed-error` where there are 8 bits. Fewer have no codes to spare for what is rare
    and far away; there it is `mse`.

    Params:
        scale: float32; values are `(code - zero_point) * scale`.
        zero_point: int8, the code of zero.
    """

    bits: int = 8
    layout: ClassVar[Mapping[str, torch.dtype]] = {"scale": torch.float32, "zero_point": torch.int8}

    @property
    def name(self) -> str:
        return f"int{self.bits}-static"

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def observer(self) -> Observer:
        """The one that chooses where none is named."""
        return CubedError() if self.bits == 8 else LeastSquares()

    @property
    def needs(self) -> frozenset[str]:
        return self.observer.needs

    def fit(self, stats: Stats, observer: Observer | None = None) -> dict[str, Tensor]:
        """Raises InputError where calibration reached no input of the site."""
        return self.params(*(observer or self.observer).range(stats, self))

    def params(self, low: float, high: float) -> dict[str, Tensor]:
        """Scale and zero point of the codes spread from `low` to `high`; `low <= 0 <= high`."""
        num_steps = self.highest - self.lowest
        ends = torch.tensor([low, high], dtype=torch.float32)
        scale = ((ends[1] - ends[0]) / num_steps).clamp_min(1e-12)
        zero_point = (-ends[0] / scale).round().clamp(0, num_steps) + self.lowest
        return {"scale": scale.view(1), "zero_point": zero_point.to(torch.int8).view(1)}

    def quantize(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Int8[Tensor, "*batch in"]:
        codes = x.float() / params["scale"] + params["zero_point"].float()
        return codes.clamp_(self.lowest, self.highest).round_().to(torch.int8)

    def fake_quantize(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        codes = self.quantize(x, params).float().sub_(params["zero_point"].float())
        return codes.mul_(params["scale"]).to(x.dtype)


@dataclass(frozen=True)
class Fp8Dynamic:
    """FP8 E4M3 with one scale per token, so that its largest value is 448 (Micikevicius et al. 2022,
    https://arxiv.org/abs/2209.05433)."""

    name = "fp8-e4m3-dynamic"
    needs = frozenset[str]()
    layout: ClassVar[Mapping[str, torch.dtype]] = {}

    def fit(self, stats: Stats) -> dict[str, Tensor]:
        return {}

    def fake_quantize(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12).div_(LARGEST_FP8)
        return fake_quantize_fp8(x, scale)


@dataclass(frozen=True)
class Fp8Static:
    """FP8 E4M3 with one scale for all tokens: the largest value seen is 448, larger ones saturate.

    Small values lose nothing by a wide range, so it is not searched.

    Params:
        scale: float32.
    """

    name = "fp8-e4m3-static"
    needs = frozenset({"sample", "largest"})
    layout: ClassVar[Mapping[str, torch.dtype]] = {"scale": torch.float32}

    def fit(self, stats: Stats) -> dict[str, Tensor]:
        """Raises InputError without a calibration sample."""
        largest = calibration_sample(self, stats).abs().amax()
        if stats.largest is not None:
            largest = torch.maximum(largest, stats.largest.amax())
        return {"scale": largest.float().clamp_min(1e-12).div(LARGEST_FP8).view(1)}

    def fake_quantize(self, x: Float[Tensor, "*batch in"], params: Mapping[str, Tensor]) -> Float[Tensor, "*batch in"]:
        return fake_quantize_fp8(x, params["scale"])


LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


def fake_quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Through FP8 E4M3 and back; values beyond its range saturate."""
    codes = (x.float() / scale).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def calibration_sample(activation: ActivationFormat, stats: Stats) -> Float[Tensor, "token in"]:
    """The sample a static format is fitted to."""
    if stats.sample is None or not stats.sample.numel():
        raise InputError(
            f"{activation.name} needs calibration inputs, and none reached this site; give calibration data that "
            f"does, or use fp8-e4m3-dynamic"
        )
    return stats.sample.float()


ROWS: list[ActivationFormat] = [
    Int8Dynamic(),
    *(IntStatic(bits) for bits in (8, 6, 4, 3, 2)),
    Fp8Dynamic(),
    Fp8Static(),
]
ACTIVATIONS = {activation.name: activation for activation in ROWS}
INT8 = ("int8-dynamic", "int8-static")  # whose codes are bytes, which 8-bit kernels multiply


def activation_named(name: str) -> ActivationFormat:
    """The activation format a recipe or an artifact names."""
    if name not in ACTIVATIONS:
        raise UnknownName("activation format", name, ACTIVATIONS)
    return ACTIVATIONS[name]
