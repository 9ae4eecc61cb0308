"""A network behind the normalisation that other code does by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_KEPT = "__normalised__"  # an attribute of the model, so that its plans last as long as it does


class Normalised(nn.Module):
    """Of images [N, C, H, W]: ``model((images - mean) / std)``."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def normalised(model: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Normalised:
    """The same one for the same model and numbers."""
    known = vars(model).setdefault(_KEPT, {})
    network = known.setdefault((*mean, *std), Normalised(model, mean, std))
    if network.mean.device != device:
        network.mean, network.std = network.mean.to(device), network.std.to(device)
    return network
