"""The model computes the same (test_transforms.py); here, that the batch norms have nothing left to do."""

from dataclasses import dataclass

import pytest
import torch
from models import model_of
from torch import nn

import tersor
from tersor.nn.parameters import set_parameter
from tersor.pipeline import apply_transform
from tersor.transforms.equalize import Equalize
from tersor.transforms.fold_bn import FoldBn, is_neutral


def test_batch_norms_only_add_a_bias_afterwards():
    model = model_of("resnet")
    FoldBn().apply(model, {})
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5
    assert all(map(is_neutral, norms))
    assert not model[3].bn2.bias.any(), "conv2 has a bias of its own, which takes all"
    assert model[3].bn1.bias.any(), "conv1 has none"


def test_a_batch_norm_whose_input_has_another_reader_stays():
    """Beside one that can be folded."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), model_of_two()).double().eval()
    FoldBn().apply(model, {})
    assert is_neutral(model[1])
    assert not is_neutral(model[2].bn)


def model_of_two():
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.bn.running_mean.fill_(0.5)

        def forward(self, x):
            y = self.conv(x)
            return y + self.bn(y)

    return TwoReaders()


def test_a_reused_layer_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn2(self.conv2(self.bn(self.conv(self.conv(x)))))

    model = Twice().eval()
    before = model.conv.weight.detach().clone()
    FoldBn().apply(model, {})
    assert torch.equal(model.conv.weight, before)
    assert is_neutral(model.bn2)


def normed(layer, norm):
    """A layer before a batch norm, and a convolution before another one."""
    torch.manual_seed(0)
    shaped = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 4, 2)))
    model = nn.Sequential(layer, norm, shaped, nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8))
    for each in (norm, model[4]):
        each.running_mean.normal_()
        each.running_var.uniform_(0.2, 3)
        nn.init.normal_(each.weight)
    return model.eval()


CASES = {  # shape of the input, layer, norm, whether they fold
    "linear, two axes": ((2, 8), lambda: nn.Linear(8, 8), nn.BatchNorm1d, True),
    "linear over the last of three axes": ((2, 8, 8), lambda: nn.Linear(8, 8), nn.BatchNorm1d, False),
    "linear over the last of four axes": ((2, 8, 8, 8), lambda: nn.Linear(8, 8), nn.BatchNorm2d, False),
    "linear over the last of five axes": ((2, 8, 2, 2, 8), lambda: nn.Linear(8, 8), nn.BatchNorm3d, False),
    "conv1d": ((2, 8, 8), lambda: nn.Conv1d(8, 8, 1), nn.BatchNorm1d, True),
    "conv1d of one example": ((8, 8), lambda: nn.Conv1d(8, 8, 1), nn.BatchNorm1d, False),
    "conv2d": ((2, 8, 4, 4), lambda: nn.Conv2d(8, 8, 1), nn.BatchNorm2d, True),
    "grouped conv3d": ((2, 8, 2, 2, 2), lambda: nn.Conv3d(8, 8, 1, groups=4), nn.BatchNorm3d, True),
    "conv transposed": ((2, 8, 8), lambda: nn.ConvTranspose1d(8, 8, 1), nn.BatchNorm1d, False),
}


class Ready:
    """A task of one batch."""

    name, output, description, fingerprint = "ready", "values", "numbers", "1"

    def __init__(self, x):
        self.x = x

    def batches(self, split, batch_size):
        return iter([self.x])

    def forward(self, model, batch):
        return model(batch)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_only_what_lies_on_the_norms_axis_is_folded(case):
    shape, layer, norm, folds = CASES[case]
    model, x = normed(layer(), norm(8)), torch.randn(shape)
    before = model(x)
    apply_transform(model, FoldBn(), Ready(x))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [is_neutral(norm) for norm in norms] == [folds, True]


@torch.no_grad()
def test_layers_with_hooks_are_left_alone():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    model[0].register_forward_hook(lambda module, args, y: y.exp())
    x = torch.randn(2, 4, 5)
    before = model(x)
    apply_transform(model, FoldBn(), Ready(x))
    torch.testing.assert_close(model(x), before)
    assert [model[0].weight.shape, is_neutral(model[3])] == [(4, 4, 1), True]


@dataclass(frozen=True)
class Broken:
    """A transform that does not keep its promise."""

    by: float
    name = "broken"
    needs = frozenset()

    def apply(self, model, stats):
        set_parameter(model[0], "weight", model[0].weight * (1 + self.by))
        model[1].register_buffer("running_mean", model[1].running_mean + self.by)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_changes_the_function_is_taken_back_by_name(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).to(dtype).eval()
    x, state = torch.randn(3, 4, dtype=dtype), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        tersor.TersorError, match=r"broken: changes what Sequential computes by .* it rewrote 0, 1, and"
    ):
        apply_transform(model, Broken(0.5), Ready(x))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    apply_transform(model, Broken(torch.finfo(dtype).eps), Ready(x))
    assert not torch.equal(model[1].running_mean, state["1.running_mean"])


@torch.no_grad()
def test_equalizing_knows_the_axis_too():
    """A pool over the features of a linear layer mixes its channels."""
    pooled = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 8))
    model = nn.Sequential(pooled, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    x = torch.randn(2, 4, 8)
    before, weight = model(x), pooled[0].weight
    apply_transform(model, Equalize(), Ready(x))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert pooled[0].weight is weight
