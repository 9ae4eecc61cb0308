"""The search of torchattacks' APGD, whose checkpoints, comparisons and results are not those of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM, TINY = 0.75, 1e-12
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Search:
    """One run of APGD.

    Attributes:
        evaluate: (images) -> the loss of each [n], its gradient, and whether the network is right [n].
        norm: ``"Linf"`` or ``"L2"``.
        eps, steps, rho: radius, steps, and the share of rises below which a step is halved.
    """

    evaluate: Evaluate
    norm: str
    eps: float
    steps: int
    rho: float

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """For each image [n, C, H, W] the last iterate that fooled the network, and whether there is one [n]."""
        window, least, less = (max(int(part * self.steps), 1) for part in (0.22, 0.06, 0.03))
        x = before = found = self._start(images)
        loss, gradient, right = self.evaluate(x)
        best, best_gradient, best_loss = x, gradient, loss
        rate = self.eps * torch.ones_like(x[:, :1, :1, :1]) * 2
        history = torch.zeros(
            self.steps, len(x), device=x.device
        )  # of losses; what is before the first is the last row
        checked, halved, since = best_loss, torch.ones_like(right), 0
        for number in range(self.steps):
            momentum, before = x - before, x
            part = MOMENTUM if number else 1.0
            target = self._project(self._step(x, gradient, rate), images, 0.0)
            x = self._project(x + (target - x) * part + momentum * (1 - part), images, TINY)
            loss, gradient, is_right = self.evaluate(x)
            right = right & is_right
            found = _where(is_right, found, x)
            history[number] = loss
            higher = loss > best_loss
            best, best_gradient = _where(higher, x, best), _where(higher, gradient, best_gradient)
            best_loss = torch.where(higher, loss, best_loss)
            since += 1
            if since == window:
                rises = sum((history[number - n] > history[number - n - 1]).double() for n in range(window))
                halved = (rises <= window * self.rho) | (~halved & (checked >= best_loss))
                rate = _where(halved, rate / 2, rate)
                x, gradient = _where(halved, best, x), _where(halved, best_gradient, gradient)
                checked, since, window = best_loss, 0, max(window - less, least)
        return found, ~right

    def _start(self, images: Tensor) -> Tensor:
        if self.norm == "Linf":
            noise = 2 * torch.rand(images.shape).to(images) - 1
            length = noise.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        else:
            noise = torch.randn(images.shape).to(images)
            length = _length(noise) + TINY
        return (images + self.eps * noise / length).clamp(0, 1)

    def _step(self, x: Tensor, gradient: Tensor, rate: Tensor) -> Tensor:
        if self.norm == "Linf":
            return x + rate * gradient.sign()
        return x + rate * gradient / (_length(gradient) + TINY)

    def _project(self, x: Tensor, images: Tensor, more: float) -> Tensor:
        if self.norm == "Linf":
            return torch.min(torch.max(x, images - self.eps), images + self.eps).clamp(0, 1)
        offset = x - images
        length = _length(offset)
        return (images + offset / (length + TINY) * (length + more).clamp(max=self.eps)).clamp(0, 1)


def _length(x: Tensor) -> Tensor:
    return (x**2).sum(dim=(1, 2, 3), keepdim=True).sqrt()


def _where(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """By image."""
    return torch.where(chosen.view(-1, 1, 1, 1), yes, no)
