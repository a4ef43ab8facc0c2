"""What PyTorch records or transforms: traces, functional gradients, second derivatives, the fused encoder's zeros."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import tersor
from tersor.core.errors import ModelError

torch.manual_seed(0)
X = torch.randn(3, 32)
CALLS = {
    "jacrev": lambda model: vmap(jacrev(model))(X),
    "jacfwd": lambda model: vmap(jacfwd(model))(X),
    "hessian": lambda model: hessian(lambda x: model(x).sum())(X[0]),
    "jvp": lambda model: jvp(model, (X,), (X,))[1],
    "grad": lambda model: grad(lambda x: model(x).square().sum())(X),
    "grad of a bias": lambda model: grad(lambda bias: functional_call(model, {"2.bias": bias}, X).square().sum())(
        torch.ones(16)
    ),
    "twice": lambda model: torch.autograd.functional.hessian(lambda x: model(x).square().sum(), X[0]),
}


def models(scheme):
    """A compressed model, and a float one with its decoded weights."""
    torch.manual_seed(1)
    float_model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)).eval()
    return tersor.compress(float_model, scheme).model, decoded(float_model, scheme)


def decoded(model, scheme):
    """A float model of the weights that a scheme makes."""
    made, compressed = copy.deepcopy(model), tersor.compress(model, scheme).model
    with torch.no_grad():
        for site in tersor.find_sites(made):
            site.weight(made).copy_(site.weight(compressed))
    return made


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("scheme", "room"), [("int4-g32", 1e-6), ("int8/int8-dynamic", 0.02)])
def test_derivatives_are_those_of_the_decoded_weights(call, scheme, room):
    compressed, reference = models(scheme)
    expected = call(reference)
    assert (call(compressed) - expected).norm() <= room * expected.norm()


TRACED = """
import torch, tersor
from torch import nn
x = torch.randn(3, 32)
for scheme in ["int4-g32", "int8", "int8/int8-dynamic"]:
    compressed = tersor.compress(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16)).eval(), scheme).model
    for enabled in [False, True]:
        with torch.set_grad_enabled(enabled):
            traced = torch.jit.trace(compressed, x)
            torch.testing.assert_close(traced(x + 1), compressed(x + 1))
"""


@pytest.mark.slow  # a process of its own: shapes are tensors in a trace, which the checks of types here do not take
def test_traces_compute_what_the_model_computes():
    subprocess.run([sys.executable, "-W", "ignore", "-c", TRACED], check=True, timeout=900)


MASKS = {
    "padding last": [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
    "padding first": [[1, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
    "no padding": [[0] * 5] * 2,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
def test_padding_of_an_encoder_comes_out_as_before(mask, norm_first, mode):
    layer = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32))
    nn.init.normal_(encoder.norm.bias)
    reference = decoded(encoder, "int4-g32").train(mode == "train")
    compressed = tersor.compress(encoder, "int4-g32").model.train(mode == "train")
    x, padding = torch.randn(2, 5, 32), torch.tensor(mask, dtype=torch.bool)
    with torch.set_grad_enabled(mode != "eval"):
        expected = reference(x, src_key_padding_mask=padding)
        torch.testing.assert_close(compressed(x, src_key_padding_mask=padding), expected)
        torch.testing.assert_close(copy.deepcopy(compressed)(x, src_key_padding_mask=padding), expected)


def test_layers_without_a_shape_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ModelError, match=r"1 \(LazyLinear\) has no shape before its first input"):
        tersor.compress(model, "int4-g32")
    model(torch.randn(2, 8))
    assert [site.name for site in tersor.find_sites(tersor.compress(model, "int8").model)] == ["0", "1"]
