"""The balls that an attack may not leave: their starts, steepest directions and projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

NORMS = ("linf", "l2", "l2-sign", "l1")
_NAMES = {"linf": "linf", "inf": "linf", inf: "linf", "l2": "l2", 2: "l2", "l1": "l1", 1: "l1"}
_TINY = 1e-12
_MOVED = 0.01  # of the pixel values, in a step of the L1 norm

Number = float | Tensor  # for all images or, as a tensor [1 or N, 1 or C, 1, 1], per image or per channel


def norm_named(norm: Any) -> Any:
    """One of :data:`NORMS` for what people call them: ``"Linf"``, ``math.inf``, ``2``, ``"L1"``; others as they are."""
    try:
        return _NAMES.get(norm.lower() if isinstance(norm, str) else norm, norm)
    except TypeError:  # cannot be hashed
        return norm


@dataclass(frozen=True)
class Ball:
    """All images in [low, high] within ``eps`` of the clean ones; in pixel units. Images are float [N, C, H, W]."""

    norm: str
    eps: Number
    low: Number = 0.0
    high: Number = 1.0

    def of(self, pick: Callable[[Number], Number]) -> Ball:
        """That of some of the images; ``pick`` takes their part of a number per image."""
        return replace(self, eps=pick(self.eps), low=pick(self.low), high=pick(self.high))

    def noise(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform in the cube for ``linf`` and ``l2-sign``, in the ball for ``l2`` and ``l1``."""
        device = images.device if generator is None else generator.device
        noise = torch.empty(images.shape, dtype=images.dtype, device=device)
        if self.norm in ("l2", "l1"):
            rows = (len(images), 1, 1, 1)
            if self.norm == "l2":
                direction = noise.normal_(generator=generator)
                radius = torch.rand(rows, dtype=images.dtype, device=device, generator=generator)
                unit = direction / lengths(direction).clamp_min(_TINY)
                noise = unit * self._on(device) * radius ** (1 / images[0].numel())
            else:  # normalised exponential variables, one more of them than pixels
                size = noise.exponential_(generator=generator)
                rest = torch.empty(rows, dtype=images.dtype, device=device).exponential_(generator=generator)
                sign = torch.randint(0, 2, images.shape, device=device, generator=generator) * 2 - 1
                noise = sign * size / (size.sum((1, 2, 3), keepdim=True) + rest) * self._on(device)
        elif isinstance(self.eps, Tensor):
            noise = noise.uniform_(-1, 1, generator=generator) * self._on(device)
        else:
            noise.uniform_(-self.eps, self.eps, generator=generator)
        return noise.to(images.device)

    def step(self, x: Tensor, gradient: Tensor, alpha: Number) -> Tensor:
        """``x`` after a step of length ``alpha`` in the direction in which the loss rises most; not projected.

        For ``l1`` the hundredth of the pixel values with the largest gradients moves, by the same amount, those at the
        end of their range left out (Tramèr and Boneh, arXiv 1904.13000, algorithm 1).
        """
        if self.norm == "l2":
            return x + alpha * gradient / lengths(gradient).clamp_min(_TINY)
        if self.norm != "l1":
            return x + alpha * gradient.sign()
        stuck = ((x <= self.low) & (gradient < 0)) | ((x >= self.high) & (gradient > 0))
        free = gradient.masked_fill(stuck, 0)
        count = max(1, round(_MOVED * x[0].numel()))
        index = free.flatten(1).abs().topk(count).indices
        direction = torch.zeros_like(x).flatten(1).scatter_(1, index, 1.0).view_as(x) * free.sign()
        return x + alpha * direction / count

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        """Into the ball around ``clean``, then into [low, high], which does not lead out of the ball."""
        if self.norm == "linf":
            x = x.clamp(clean - self.eps, clean + self.eps)
        elif self.norm == "l1":
            x = clean + _into_l1(x - clean, self.eps)
        else:
            offset = x - clean
            length = lengths(offset)
            x = torch.where(length > self.eps, clean + offset / length * self.eps, x)
        return self.clamp(x)

    def clamp(self, x: Tensor) -> Tensor:
        """Into [low, high], in place."""
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return torch.maximum(torch.minimum(x, torch.as_tensor(self.high)), torch.as_tensor(self.low))
        return x.clamp_(self.low, self.high)

    def _on(self, device: torch.device) -> Number:
        return self.eps.to(device) if isinstance(self.eps, Tensor) else self.eps


def lengths(x: Tensor) -> Tensor:
    """L2 norm of each image, [N, 1, 1, 1]."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _into_l1(offset: Tensor, eps: Number) -> Tensor:
    """The nearest offset whose absolute values sum up to at most ``eps`` (Duchi et al., ICML 2008, figure 1)."""
    size = offset.flatten(1).abs()
    eps = eps.flatten(1) if isinstance(eps, Tensor) else torch.full((1, 1), eps, dtype=size.dtype, device=size.device)
    ordered = size.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - eps
    count = torch.arange(1, size.shape[1] + 1, dtype=size.dtype, device=size.device)
    kept = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    shrunk = (size - excess.gather(1, kept - 1) / kept).clamp_min(0)
    inside = size.sum(1, keepdim=True) <= eps
    return torch.where(inside, size, shrunk).view_as(offset) * offset.sign()
