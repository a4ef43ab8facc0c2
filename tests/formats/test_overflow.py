"""int8 weights whose products no kernel overflows, judged by what the instruction does, textbook style."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor import Recipe
from tersor.checkpoint.layout import packed_sites
from tersor.formats.int_group import IntGroup
from tersor.formats.overflow import MOST, Neighbours, SafeInt8, keeps_pair_rule, num_overflowing
from tersor.methods.gptq import Gptq
from tersor.methods.stats import Stats


def multiplied(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What `vpmaddubsw` makes of unsigned and signed bytes: sums of two neighbouring products, in 16 bits."""
    products = inputs.astype(np.int64) * weights.astype(np.int64)
    return np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1)


def is_exact(weights: np.ndarray) -> bool:
    """Whether the instruction gives every sum of rows `[out, in]` with an even number of columns, for inputs at both
    ends of a byte: products grow with inputs, so these are the worst."""
    for pair in product((0, 255), repeat=2):
        inputs = np.tile(np.array(pair), weights.shape[-1] // 2)
        true = (inputs * weights.astype(np.int64)).reshape(*weights.shape[:-1], -1, 2).sum(-1)
        if (multiplied(inputs, weights) != true).any():
            return False
    return True


def even(rows: np.ndarray) -> np.ndarray:
    """Rows with a zero at the end where the number of columns is odd."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, rows.shape[-1] % 2)])


def as_onnx_runtime_adds(weight: torch.Tensor) -> np.ndarray:
    """A weight in its own shape as rows in the order (pixel, channel), without padding in between."""
    last = weight.reshape(*weight.shape[:2], -1).transpose(1, 2) if weight.ndim > 2 else weight
    return even(last.reshape(len(weight), -1).numpy())


def as_openvino_adds(weight: torch.Tensor) -> np.ndarray:
    """The same with the channels of every pixel padded to an even number."""
    last = weight.reshape(*weight.shape[:2], -1).transpose(1, 2) if weight.ndim > 2 else weight.unsqueeze(1)
    return even(last.numpy()).reshape(len(weight), -1)


def test_the_bound_is_that_of_the_instruction():
    assert is_exact(np.array([[127, 1], [-128, 0], [64, 64], [-100, -28], [127, -128]]))
    assert not is_exact(np.array([[127, 2]]))
    assert not is_exact(np.array([[-65, -64]]))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 6), (12,)),
    "odd columns": (lambda: nn.Linear(7, 6), (7,)),
    "one column": (lambda: nn.Linear(1, 6), (1,)),
    "3 channels": (lambda: nn.Conv2d(3, 6, 3), (3, 6, 6)),
    "5 channels": (lambda: nn.Conv2d(5, 6, 3), (5, 6, 6)),
    "1 channel": (lambda: nn.Conv2d(1, 6, 5), (1, 8, 8)),
    "1x1, odd": (lambda: nn.Conv2d(5, 6, 1), (5, 6, 6)),
    "grouped, even": (lambda: nn.Conv2d(8, 6, 3, groups=2), (8, 6, 6)),
    "grouped, odd": (lambda: nn.Conv2d(9, 6, 3, groups=3), (9, 6, 6)),
    "several for each channel": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    "1-d": (lambda: nn.Conv1d(3, 6, 3), (3, 9)),
    "3-d": (lambda: nn.Conv3d(3, 6, (1, 2, 3)), (3, 4, 4, 4)),
}
WEIGHTS = {
    "equal": torch.ones_like,
    "all negative": lambda w: -1 - 0.3 * w.abs(),
    "neighbours of one sign": lambda w: (1 + w.abs()) * (1 - 2 * (torch.arange(w.numel()) // 2 % 2)).view(w.shape),
    "heavy tails": lambda w: w.sign() * w.abs().exp().square(),
    "random": lambda w: w,
}


@torch.no_grad()
def layer_with(layer: str, weight: str) -> nn.Module:
    torch.manual_seed(0)
    module = LAYERS[layer][0]()
    module.weight.copy_(WEIGHTS[weight](torch.randn_like(module.weight)))
    return module


class Inputs:
    """A few random inputs as a task to calibrate on."""

    name, output, description, fingerprint = "inputs", "values", "", ""

    def __init__(self, *shape: int):
        self.inputs = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))

    def prepare(self, original):
        pass

    def batches(self, split, batch_size=None):
        yield self.inputs

    def forward(self, model, batch):
        return model(batch)


def codes_of(model: nn.Module) -> torch.Tensor:
    """The codes of the one site, in the shape of its weight."""
    ((site, packed, _),) = packed_sites(model)
    return site.fold.unfold(packed.encoded.parts["codes"])


@pytest.mark.parametrize("method", ["nearest", "mse", "gptq", "gptq(num_rounds=2)"])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_kernel_overflows(layer, method):
    for weight in WEIGHTS:
        module = layer_with(layer, weight)
        made = tersor.compress(module, f"{method}:int8/int8-static", Inputs(*LAYERS[layer][1])).model
        codes = codes_of(made)
        assert is_exact(as_onnx_runtime_adds(codes)), weight
        assert is_exact(as_openvino_adds(codes)), weight


@pytest.mark.parametrize("scheme", ["nearest:int8/int8-dynamic", "autoround(num_steps=5):int8/int8-dynamic"])
def test_other_schemes_keep_the_rule(scheme):
    made = tersor.compress(layer_with("odd columns", "neighbours of one sign"), scheme, Inputs(7)).model
    assert is_exact(as_onnx_runtime_adds(codes_of(made)))


def test_recurrent_layers_keep_the_rule():
    layer = nn.LSTM(5, 4)
    nn.init.uniform_(layer.weight_ih_l0, 0.5, 1)
    made = tersor.compress(layer, "nearest:int8/int8-dynamic").model
    for _, packed, _ in packed_sites(made):
        assert is_exact(even(packed.encoded.parts["codes"].numpy()))


@pytest.mark.parametrize(
    "change", [{"cpu": "vnni"}, {"scheme": "nearest:int8"}, {"scheme": "nearest:int8/int6-static"}]
)
def test_weights_are_free_where_nothing_overflows(change):
    step = {"scheme": "nearest:int8/int8-static", **change}
    made = tersor.compress(layer_with("linear", "equal"), Recipe(steps=[step]), Inputs(12)).model
    assert (codes_of(made) == 127).all()


def test_depthwise_convolutions_are_free():
    layer = nn.Conv2d(6, 6, 3, groups=6)
    nn.init.ones_(layer.weight)
    made = tersor.compress(layer, "nearest:int8/int8-static", Inputs(6, 6, 6)).model
    assert (codes_of(made) == 127).all()


def test_rows_are_rescaled_only_as_far_as_they_ask():
    weight = torch.tensor([[1.0, -1.0, 0.5, -0.2], [1.0, 0.25, -0.5, -0.75], [1.0, 1.0, 0.0, 0.0]])
    safe = SafeInt8(8, neighbours=Neighbours(4))
    plain, spanned = IntGroup(8).fit(weight)["scale"].float(), safe.fit(weight)["scale"].float()
    assert torch.allclose(spanned / plain, torch.tensor([[1.0], [1.25 * 127 / 128], [2 * 127 / 128]]), rtol=1e-3)


def test_a_solver_makes_up_for_what_a_pair_cannot_hold():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(200, 8) @ torch.randn(8, 32)
    stats, safe = Stats(second_moment=x.t() @ x / 200), SafeInt8(8, neighbours=Neighbours(32))
    nearest = safe.fake_quantize(weight, safe.fit(weight))
    solved = Gptq(upstream_correction=0).compress(weight, safe, stats)
    assert keeps_pair_rule(solved.parts["codes"])
    assert ((solved.decode() - weight) @ x.t()).square().sum() < 0.5 * ((nearest - weight) @ x.t()).square().sum()


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    channels=st.integers(1, 7),
    pixels=st.integers(1, 4),
    factor=st.floats(0.2, 1.5),
)
def test_any_weight_at_any_scale_keeps_the_rule(data, channels, pixels, factor):
    numbers = data.draw(st.lists(st.floats(-1, 1, width=16), min_size=channels * pixels, max_size=channels * pixels))
    weight, safe = torch.tensor([numbers]), SafeInt8(8, neighbours=Neighbours(channels, pixels))
    params = safe.fit(weight, factor)
    encoded, free = safe.encode(weight, params), IntGroup(8).encode(weight, params)
    codes = encoded.parts["codes"]
    shaped = codes.view(1, channels, pixels)
    assert is_exact(as_onnx_runtime_adds(shaped))
    assert is_exact(as_openvino_adds(shaped))
    assert torch.equal(encoded.decode(), safe.fake_quantize(weight, params))
    assert torch.equal(safe.encode(encoded.decode(), params).parts["codes"], codes)
    if keeps_pair_rule(free.parts["codes"], safe.neighbours):
        assert torch.equal(codes, free.parts["codes"])
    project = safe.projector(params, (1, channels * pixels))
    one_by_one = torch.stack([project(weight[:, j], j) for j in range(channels * pixels)], 1)
    assert torch.equal(safe.encode(one_by_one, params).decode(), one_by_one)


@pytest.mark.parametrize("first", range(-127, 128, 3))
def test_the_least_is_lost_of_a_pair(first):
    safe, scale = SafeInt8(8, neighbours=Neighbours(2)), {"scale": torch.ones(1, 1).half()}
    for second in range(-127, 128, 5):
        pair = torch.tensor([[first + 0.4, second - 0.3]])
        found = safe.fake_quantize(pair, scale)
        a = torch.arange(-127.0, 128)
        every = torch.cartesian_prod(a, a)
        every = every[every.sum(1).abs() <= MOST]
        assert (found - pair).square().sum() <= (every - pair).square().sum(1).min() + 1e-4


def test_rows_that_overflow_are_counted():
    codes = torch.tensor([[127, 2, 0], [127, 1, 127], [0, 127, 127]], dtype=torch.int8)
    assert num_overflowing(codes) == 1
    assert num_overflowing(codes, Neighbours(1, 3)) == 1
    assert num_overflowing(codes.roll(1, 1)) == 1
