"""ResNets with the input stage of the published code inside and a downstream head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as tv_resnet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from twins_fast.models.clamp import clamp

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class CifarResNet(nn.Module):
    """Small residual network (He et al., arXiv 1512.03385) for 32 x 32 images, input normalisation included.

    The input is clamped to [0, 1] and normalised with ImageNet statistics; then come a 3x3
    convolution, one stage per entry of ``blocks`` (width ``width * 2**i``, stride 2 from the second
    stage on), the mean over height and width, and the linear head ``fc_downstream``.

    Args:
        num_classes: number of logits.
        width: channels of the first stage.
        blocks: residual blocks per stage.
        block: ``"basic"`` or ``"bottleneck"``.

    Shapes:
        images [N, 3, H, W] floating point in [0, 1] -> logits [N, num_classes].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int, width: int = 16, blocks: Sequence[int] = (2, 2, 2, 2), block: str = "basic"):
        super().__init__()
        kind = _BLOCKS[block]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inplanes, stages = width, []
        for i, depth in enumerate(blocks):
            planes, stride, stage = width * 2**i, 1 if i == 0 else 2, []
            for j in range(depth):
                shortcut = None
                if j == 0 and (stride != 1 or inplanes != planes * kind.expansion):
                    shortcut = nn.Sequential(
                        tv_resnet.conv1x1(inplanes, planes * kind.expansion, stride),
                        nn.BatchNorm2d(planes * kind.expansion),
                    )
                stage.append(kind(inplanes, planes, stride if j == 0 else 1, shortcut))
                inplanes = planes * kind.expansion
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.fc_downstream = nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = _standardize(images, self.mean, self.std)  # [N, 3, H, W]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layers(x)  # [N, C, H', W']
        return self.fc_downstream(x.mean((2, 3)))


class TransferResNet(ResNet):
    """torchvision ResNet (He et al., arXiv 1512.03385) with the published input stage and a downstream head.

    Inside the model, in this order: nearest-neighbour upsampling to ``upsample`` (so that an attack
    acts on the small pixels), clamp to [0, 1], ImageNet normalisation, the ResNet body, the head
    ``fc_downstream``. The ImageNet head ``fc`` stays, unused. Entries are named as in torchvision.

    Args:
        block: of :class:`torchvision.models.ResNet`.
        layers: likewise.
        num_classes: downstream classes.
        upsample: side in pixels to upsample to, or None.
        width_per_group: of :class:`torchvision.models.ResNet`.

    Shapes:
        images [N, 3, H, W] floating point in [0, 1] -> logits [N, num_classes].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int,
        upsample: int | None = None,
        width_per_group: int = 64,
    ):
        super().__init__(block, list(layers), width_per_group=width_per_group)
        self.upsample = upsample
        self.fc_downstream = nn.Linear(self.fc.in_features, num_classes)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.upsample is not None:
            images = F.interpolate(images, size=(self.upsample, self.upsample), mode="nearest")
        x = _standardize(images, self.mean, self.std)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc_downstream(self.avgpool(x).flatten(1))


def _standardize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (clamp(images) - mean) / std
