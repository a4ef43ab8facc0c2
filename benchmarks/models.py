"""The small image models that benchmarks train and compress, and the data they are measured on.

ResNet-20 and ResNet-56 for CIFAR-10 (He et al. 2015, https://arxiv.org/abs/1512.03385), LeNet-300-100 and LeNet-5 in
the sizes of Han et al. 2015 (https://arxiv.org/abs/1506.02626).

FOLDER, given by `--assets` or TERSOR_ASSETS, holds `cifar10.npz`, `vision/mnist.npz` and
`vision/resnet{20,56}-cifar10.safetensors` (trained by Y. Idelbayev, https://github.com/akamaster/pytorch_resnet_cifar10,
BSD-2; 91.73 % and 93.39 % of the test set), and `efficientnet-lite0.safetensors` (Tan and Le 2019,
https://arxiv.org/abs/1905.11946, in the variant without squeeze-and-excitation and with ReLU6; ImageNet, 75.1 %).

As a factory for the command line: `PYTHONPATH=benchmarks tersor compress models:resnet20 --weights FILE ...`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad, relu, relu6

import tersor
from tersor.tasks import Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions around which a shortcut without parameters leads (option A of the paper)."""

    def __init__(self, num_in: int, num_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride, self.missing = stride, num_out - num_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        return relu(out + x)


class ResNetCifar(nn.Module):
    """`depth` 20 has 269,722 parameters, 56 has 853,018; images `[row, 3, 32, 32]` to logits `[row, 10]`."""

    def __init__(self, depth: int = 20):
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(16, 16, 1, num_blocks)
        self.layer2 = self.stage(16, 32, 2, num_blocks)
        self.layer3 = self.stage(32, 64, 2, num_blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def stage(num_in: int, num_out: int, stride: int, num_blocks: int) -> nn.Sequential:
        more = [Block(num_out, num_out, 1) for _ in range(num_blocks - 1)]
        return nn.Sequential(Block(num_in, num_out, stride), *more)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(avg_pool2d(x, x.shape[-1]).flatten(1))


def padded(x: Tensor, size: int, stride: int) -> Tensor:
    """For images whose sides the stride divides."""
    total = max(size - stride, 0)
    return pad(x, (total // 2, total - total // 2) * 2)


class Inverted(nn.Module):
    """Expand, depthwise, project; names as in the published weights."""

    def __init__(self, num_in: int, num_out: int, expand: int, size: int, stride: int):
        super().__init__()
        width = num_in * expand
        if expand > 1:
            self._expand_conv = nn.Conv2d(num_in, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(width, width, size, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, num_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(num_out, eps=1e-3)
        self.expand, self.size, self.stride = expand, size, stride
        self.shortcut = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.expand > 1 else x
        y = relu6(self._bn1(self._depthwise_conv(padded(y, self.size, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """4,652,008 parameters; images `[row, 3, 224, 224]` as `(x - 127) / 128` to logits `[row, 1000]`."""

    STAGES = (  # channels, expansion, kernel, stride, number of blocks
        *((16, 1, 3, 1, 1), (24, 6, 3, 2, 2), (40, 6, 5, 2, 2), (80, 6, 3, 2, 3)),
        *((112, 6, 5, 1, 3), (192, 6, 5, 2, 4), (320, 6, 3, 1, 1)),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks, num_in = [], 32
        for num_out, expand, size, stride, num_blocks in self.STAGES:
            for number in range(num_blocks):
                blocks.append(Inverted(num_in, num_out, expand, size, stride if number == 0 else 1))
                num_in = num_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(num_in, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = relu6(self._bn0(self._conv_stem(padded(x, 3, 2))))
        for block in self._blocks:
            x = block(x)
        return self._fc(relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


class LeNet300100(nn.Module):
    """266,610 parameters, all in three linear layers; `[row, 1, 28, 28]` to logits `[row, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(relu(self.fc2(relu(self.fc1(x.flatten(1))))))


class LeNet5(nn.Module):
    """431,080 parameters, with 20 and 50 channels as in Caffe; `[row, 1, 28, 28]` to logits `[row, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(self.conv2(max_pool2d(self.conv1(x), 2)), 2)
        return self.fc2(relu(self.fc1(x.flatten(1))))


def resnet20() -> ResNetCifar:
    return ResNetCifar(20)


def resnet56() -> ResNetCifar:
    return ResNetCifar(56)


def resnet_file(assets: Path, depth: int = 20) -> Path:
    """Exits with a message where the weights are missing."""
    return existing(assets / "vision" / f"resnet{depth}-cifar10.safetensors")


def open_resnet(assets: Path, depth: int = 20) -> ResNetCifar:
    """The trained model, in eval mode."""
    model = ResNetCifar(depth)
    left_out = model.load_state_dict(load_file(resnet_file(assets, depth)), strict=False)
    assert not left_out.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in left_out.missing_keys)
    return model.eval()


def open_efficientnet(assets: Path) -> EfficientNetLite0:
    """The trained model, in eval mode."""
    model = EfficientNetLite0()
    left_out = model.load_state_dict(load_file(existing(assets / "efficientnet-lite0.safetensors")), strict=False)
    assert not left_out.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in left_out.missing_keys)
    return model.eval()


def fresh(kind: type[nn.Module], seed: int) -> nn.Module:
    """A model with random weights, in eval mode; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def open_cifar(assets: Path, **options: Any) -> Task:
    """CIFAR-10 as `classification`: all 10,000 test images are judged; training images are flipped and shifted."""
    usual = {"mean": list(MEAN), "std": list(STD), "augment": ("flip", "shift")}
    return tersor.open_task("classification", existing(assets / "cifar10.npz"), options=usual | options)


def open_mnist(assets: Path, **options: Any) -> Task:
    """MNIST as `classification`: all 10,000 test digits are judged."""
    return tersor.open_task("classification", existing(assets / "vision" / "mnist.npz"), options=options)


def existing(path: Path) -> Path:
    if not path.exists():
        raise SystemExit(f"needs {path}: give --assets FOLDER")
    return path
