"""The image's way into the network, and the attack's step on it, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.models.clamp import clamp


class Input:
    """The image's way into the network: arithmetic per channel, nearest-neighbour upsampling, cast, layout.

    Args:
        program: of ``("clamp", low, high, derivative at the bounds)`` and ``(add | sub | mul | div, number or [C])``.
        shape: of one image.
        resized: its size after upsampling, or None.
    """

    def __init__(self, program: list[tuple], shape: tuple[int, ...], resized: tuple[int, int] | None):
        self.steps = program
        self.shape = shape
        self.resized = resized

    def prepare(self, x: Tensor, out: Tensor) -> None:
        """Float32 images in [0, 1] -> what the first layer reads."""
        out.copy_(self._apply(x))

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to ``x``, from that with respect to what :meth:`prepare` wrote."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self._apply(x), x, gradient.float())[0]

    def sign_step(
        self, x: Tensor, clean: Tensor, gradient: Tensor, alpha: float, eps: float, nan: Tensor, out: Tensor
    ) -> None:
        """One L-infinity step on ``x`` in place, and :meth:`prepare` into ``out``.

        A pixel whose gradient is NaN stays as it is, and is counted in ``nan`` [N] int64.
        """
        d = self.gradient(x, gradient)
        bad = d.isnan()
        nan += bad.flatten(1).sum(1)
        moved = (x + alpha * d.sign()).clamp(clean - eps, clean + eps).clamp_(0, 1)
        x.copy_(torch.where(bad, x, moved))
        self.prepare(x, out)

    def _apply(self, x: Tensor) -> Tensor:
        for kind, *arguments in self.steps:
            if kind == "clamp":
                low, high, at_bounds = arguments
                x = clamp(x, low, high) if at_bounds else F.hardtanh(x, low, high)
            else:
                other = arguments[0]
                other = other.view(-1, 1, 1) if isinstance(other, Tensor) else other
                x = getattr(torch, kind)(x, other)
        return x if self.resized is None else F.interpolate(x, size=self.resized, mode="nearest")


def sources_of(small: int, big: int) -> list[int]:
    """Which of ``small`` rows each of ``big`` rows shows, by PyTorch itself."""
    if small == big:
        return list(range(small))
    index = torch.arange(small, dtype=torch.float32).view(1, 1, small)
    return F.interpolate(index, size=big, mode="nearest").flatten().int().tolist()
