"""Small networks that an evaluation has to see through, and one that is what it seems."""

import torch
from torch import nn

from twins_fast.models import CifarResNet


class Brightness(nn.Module):
    """Two classes by the mean brightness: a linear network, whose robust accuracy is known."""

    def forward(self, images):
        above = images.mean((1, 2, 3)) - 0.5
        return 10 * torch.stack([-above, above], 1)


class Quantised(Brightness):
    """Behind a layer that rounds to levels, and so has no gradient."""

    def forward(self, images):
        return super().forward((images * 8).round() / 8)


class Random(Brightness):
    def forward(self, images):
        return super().forward(images) + torch.randn(len(images), 2)


class Saturated(Brightness):
    """So sure that the gradient of its loss is zero in float32."""

    def forward(self, images):
        return 1e6 * super().forward(images)


class Constant(nn.Module):
    """Class 0, whatever it sees."""

    def forward(self, images):
        return torch.stack([images.mean((1, 2, 3)) * 0 + 1, images.mean((1, 2, 3)) * 0], 1)


def grey(*levels):
    """An image of each brightness, and its class as :class:`Brightness` sees it."""
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return images, (images.mean((1, 2, 3)) > 0.5).long()


def small_network(classes=5):
    torch.manual_seed(0)
    return CifarResNet(num_classes=classes, width=8, blocks=(1, 1)).eval()


def batches(images, labels, size=8):
    return list(zip(images.split(size), labels.split(size), strict=True))


def learned(classes=5, count=24):
    """A network, and images that it is right about and near to its borders."""
    model = small_network(classes)
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.fc_downstream.bias -= model(images).mean(0)
        return model, images, model(images).argmax(1)
