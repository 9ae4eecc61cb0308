"""The path of the images into the network, and the attack's step on them, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.models.clamp import clamp


class Input:
    """What happens to the images before the first layer: steps per channel, upsampling, cast to the plan's dtype.

    Args:
        steps: ``("clamp", low, high, derivative at the bounds: 0 or 1)`` and
            ``("add" | "sub" | "mul" | "div", number or float32 [C])``.
        shape: (C, H, W) of an image.
        resized: (H, W) after nearest-neighbour upsampling, or None.

    Shapes:
        images float32 [N, C, H, W] contiguous -> [N, C, *resized] in half precision or float32, channels-last.
    """

    def __init__(self, steps: list[tuple], shape: tuple[int, ...], resized: tuple[int, int] | None):
        self.shape = shape
        self.resized = resized
        self.fill(steps)

    def fill(self, steps: list[tuple]) -> None:
        """Take over the numbers of these ``steps``, otherwise the same ones."""
        self.steps = steps

    def prepare(self, x: Tensor, out: Tensor) -> None:
        """Write what the first layer reads for float32 images ``x`` in [0, 1] into ``out``."""
        out.copy_(self._apply(x))

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The float32 gradient with respect to ``x``, from that with respect to what :meth:`prepare` wrote."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self._apply(x), x, gradient.float())[0]

    def sign_step(
        self, x: Tensor, clean: Tensor, gradient: Tensor, alpha: float, eps: float, nan: Tensor, out: Tensor
    ) -> None:
        """One L-infinity step on ``x`` in place, then :meth:`prepare` into ``out``.

        A pixel whose gradient is NaN stays as it is, and is counted in ``nan``.

        Args:
            x, clean: float32 [N, C, H, W].
            gradient: with respect to what :meth:`prepare` wrote.
            alpha, eps: step size and radius of the ball, in pixel units of [0, 1].
            nan: int64 [N], added to.
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
    """The index, below ``small``, of the row that each of ``big`` rows copies: PyTorch's own nearest neighbours."""
    if small == big:
        return list(range(small))
    index = torch.arange(small, dtype=torch.float32).view(1, 1, small)
    return F.interpolate(index, size=big, mode="nearest").flatten().int().tolist()
