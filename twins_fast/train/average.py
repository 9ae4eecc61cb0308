"""A moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a network's parameters (Gowal et al., arXiv 2010.03593).

    As there, it begins short: of step t, counted from 1, the decay is at most (1 + t) / (10 + t); and batch norm keeps
    the running statistics of the network itself.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self._averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number ``step``."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), list(self.model.parameters()), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the network has the average's weights."""
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(own)

    def take(self) -> None:
        """Let the network's weights as they are be the average."""
        for name, parameter in self.model.named_parameters():
            self._averages[name].copy_(parameter.detach())

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])
