"""The laws of an input quantizer, and of the kernels that run it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.activations.quantizers import Activation, ActivationFormat, activation_named
from tersor.formats.contract import Format
from tersor.kernels import reference
from tersor.methods.stats import Stats
from tersor.nn.packed import Fold, PackedLinear, PackedWeight, pack_layer
from tersor.testing.cases import random
from tersor.testing.law import hold, hold_same

FITTED: dict[str, dict[str, Tensor]] = {}


def params_for(activation: ActivationFormat) -> dict[str, Tensor]:
    """The parameters fitted to a sample, for the static formats; fitted once."""
    if activation.name in FITTED:
        return FITTED[activation.name]
    sample = random(64, 128, seed=32)
    params = activation.fit(Stats(sample=sample, largest=sample.abs().amax(0)))
    found = {name: param.dtype for name, param in params.items()}
    hold(found == activation.layout, f"fit gives {found}, the layout says {activation.layout}")
    hold(all(param.shape == (1,) for param in params.values()), "fit gives parameters of another shape than [1]")
    FITTED[activation.name] = params
    return params


def activation_name_finds_it(activation: ActivationFormat, x: Tensor) -> None:
    """The name that recipes and artifacts spell leads back here, through an Activation as well."""
    params = params_for(activation)
    hold(activation_named(activation.name) is activation, f"the table has another quantizer as {activation.name}")
    found = Activation(activation.name, params).fake_quantize(x)
    hold_same(found, activation.fake_quantize(x, params), "an Activation of this name rounds otherwise")


def activation_is_idempotent(activation: ActivationFormat, x: Tensor) -> None:
    """Up to float rounding, a representable input stays as it is."""
    params = params_for(activation)
    once = activation.fake_quantize(x, params)
    hold(once.dtype is x.dtype, f"inputs of {x.dtype} are rounded to {once.dtype}")
    hold(once.shape == x.shape, f"inputs of shape {list(x.shape)} become {list(once.shape)}")
    hold(bool(torch.isfinite(once).all()), "inputs are rounded to NaN or infinity")
    again = activation.fake_quantize(once, params)
    stays = torch.allclose(again, once, rtol=4 * torch.finfo(x.dtype).eps, atol=0)
    hold(stays, "fake_quantize changes what it made itself")


def tokens_stand_alone(activation: ActivationFormat, x: Tensor) -> None:
    """A token's result does not depend on what else is in the batch, to the last bit."""
    params = params_for(activation)
    before = x.clone()
    tokens = x.reshape(-1, x.shape[-1])
    together = activation.fake_quantize(x, params).reshape(-1, x.shape[-1])
    for token, rounded in zip(tokens, together, strict=True):
        alone = activation.fake_quantize(token, params)
        hold_same(alone, rounded, "a token alone is rounded otherwise than in a batch")
    hold_same(x, before, "fake_quantize changes the input that it is given")


ACTIVATION_LAWS = [activation_name_finds_it, activation_is_idempotent, tokens_stand_alone]


def kernel_agrees_with_reference(
    activation: ActivationFormat, format: Format, dtype: torch.dtype, bias: bool, x: Tensor
) -> None:
    """A layer gives `F.linear(fake_quantize(x), decoded weight)` up to float rounding, and each token the same in any
    batch."""
    x = x.to(dtype)
    if format.why_not((24, x.shape[-1])):
        x = torch.cat([x, x], dim=-1)
    weight = random(24, x.shape[-1], seed=40)
    encoded = format.encode(weight, format.fit(weight))
    offset = random(24, seed=41).to(x.dtype) if bias else torch.zeros(24, dtype=x.dtype)
    quantizer = Activation(activation.name, params_for(activation))
    layer = torch.nn.Linear(x.shape[-1], 24)
    layer.bias = torch.nn.Parameter(offset) if bias else None  # type: ignore[assignment]
    pack_layer(layer, PackedLinear, PackedWeight(encoded, Fold(encoded.shape), x.dtype), quantizer)
    with torch.no_grad():
        y = layer(x)
        with reference():
            plain = layer(x)
    hold(y.dtype is x.dtype, f"the layer gives {y.dtype} for inputs of {x.dtype}")
    hold(y.shape == plain.shape == (*x.shape[:-1], 24), f"the layer gives the shape {list(y.shape)}")
    decoded = encoded.decode().double()
    exact = F.linear(quantizer.fake_quantize(x.float()).double(), decoded, offset.double())
    room = 8 * torch.finfo(x.dtype).eps * F.linear(x.double().abs(), decoded.abs(), offset.double().abs())
    for other, what in ((exact, "the exact product"), (plain.double(), "the decoded layer")):
        far = int(((y.double() - other).abs() > room).sum())
        hold(not far, f"{far} of {y.numel()} outputs are further from {what} than rounding explains")
