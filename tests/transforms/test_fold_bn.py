"""The model computes the same (test_transforms.py); here, that the batch norms have nothing left to do."""

import torch
from models import model_of
from torch import nn

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
