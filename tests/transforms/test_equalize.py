import pytest
import torch
import torch.nn.functional as F
from models import model_of
from torch import nn

from tersor.core.errors import InputError, ModelError
from tersor.formats.int_group import IntGroup
from tersor.transforms.equalize import Equalize
from tersor.transforms.fold_bn import FoldBn


def ranges(model):
    """Of every row of a layer, and of every column of the one that reads it."""
    first, second = model[0].weight.detach(), model[2].weight.detach()
    return first.abs().amax(1), second.abs().amax(0)


def uneven():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 2, 12)[:, None]
        model[0].weight[3] = 0
    return model


def test_ranges_meet_in_the_middle():
    model = uneven()
    rows, columns = ranges(model)
    Equalize().apply(model, {})
    new_rows, new_columns = ranges(model)
    alive = rows > 0
    torch.testing.assert_close(new_rows[alive], (rows * columns).sqrt()[alive])
    torch.testing.assert_close(new_rows[alive], new_columns[alive])
    assert torch.equal(new_columns[~alive], columns[~alive]), "a dead channel is left alone"


def test_one_scale_for_the_whole_tensor_is_enough_then():
    """The paper's promise: per-tensor int8 loses little once the channels' ranges are equal."""
    model, x = uneven(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))

    def error():
        exact, rounded = model(x), x
        for layer in (model[0], model[2]):
            flat = layer.weight.detach().view(1, -1)
            weight = IntGroup(8).fake_quantize(flat, IntGroup(8).fit(flat)).view_as(layer.weight)
            rounded = F.linear(rounded if layer is model[0] else rounded.relu(), weight, layer.bias)
        return (rounded - exact).norm() / exact.norm()

    before = error()
    Equalize().apply(model, {})
    assert error() < 0.5 * before


def test_shortcuts_keep_their_layers():
    model = model_of("resnet")
    FoldBn().apply(model, {})
    before = {key: tensor.clone() for key, tensor in model.named_parameters() if tensor.dim() > 1}
    Equalize().apply(model, {})
    changed = {k for k, tensor in model.named_parameters() if k in before and not torch.equal(tensor, before[k])}
    assert changed == {f"{block}.conv{i}.weight" for block in (3, 4) for i in (1, 2)}


def test_relu6_passes_no_factors():
    model = model_of("mobilenet, relu6")
    FoldBn().apply(model, {})
    with pytest.raises(ModelError, match="only ReLU between them"):
        Equalize().apply(model, {})


def test_without_a_sweep_it_is_refused():
    with pytest.raises(InputError, match="num_sweeps=0"):
        Equalize(num_sweeps=0)
