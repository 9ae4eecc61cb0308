"""The networks of the attack benchmark, as adversarial training uses them; input normalisation is a wrapper."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2471, 0.2435, 0.2616)


class Normalised(nn.Module):
    """``body`` behind (images - mean) / std."""

    def __init__(self, body: nn.Module, mean: tuple[float, ...] = CIFAR_MEAN, std: tuple[float, ...] = CIFAR_STD):
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body((images - self.mean) / self.std)


def with_normalisation(model: nn.Module) -> Normalised:
    return Normalised(model)


class CifarResNet18(ResNet):
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max-pool; the first stage has ``width`` channels."""

    def __init__(self, num_classes: int, width: int = 64):
        with torch.device("meta"):  # its layers are replaced
            super().__init__(BasicBlock, [2, 2, 2, 2], num_classes)
        self.inplanes = width
        self.conv1 = _conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        for stage in range(4):
            layer = self._make_layer(BasicBlock, width << stage, 2, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)
        self.fc = nn.Linear(8 * width, num_classes)
        _initialise(self)


class PreactBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3 (He et al., arXiv 1603.05027); a shortcut of other shape starts after the ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv3x3(channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.relu(self.bn2(self.conv1(out)))
        return self.conv2(out) + shortcut


class PreactNetwork(nn.Module):
    """A 3x3 stem, stages of ``depth`` blocks (stride 2 from the second on), BN, ReLU, mean over pixels, linear head."""

    def __init__(self, num_classes: int, stem: int, widths: tuple[int, ...], depth: int):
        super().__init__()
        self.conv1 = _conv3x3(3, stem)
        blocks, channels = [], stem
        for stage, width in enumerate(widths):
            for block in range(depth):
                blocks.append(PreactBlock(channels, width, 2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def cifar_resnet18(num_classes: int, width: int = 64) -> nn.Module:
    return CifarResNet18(num_classes, width)


def preact_resnet18(num_classes: int, width: int = 64) -> nn.Module:
    """Pre-activation ResNet-18 for 32 x 32 images (as in Rice et al., arXiv 2002.11569)."""
    return PreactNetwork(num_classes, width, (width, 2 * width, 4 * width, 8 * width), 2)


def wide_resnet(depth: int, widen: int, num_classes: int) -> nn.Module:
    """WideResNet-depth-widen (Zagoruyko and Komodakis, arXiv 1605.07146; as in TRADES, arXiv 1901.08573)."""
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6 n + 4, got {depth}")
    return PreactNetwork(num_classes, 16, (16 * widen, 32 * widen, 64 * widen), blocks)


def _conv3x3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
