"""Clamping images to [0, 1] with a derivative of 1 on the whole closed interval, bounds included.

That of ``torch.clamp`` was 1 at the bounds when the published numbers were made, and is 0 there in PyTorch since
mid-2026 (pull request 191142). With 0 a pixel that has reached a bound cannot move any more: the attack is weaker and
the network looks more robust than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NOTE = (
    "the model clamps its images with a derivative of 0 at the bounds (torch.clamp of this PyTorch, or hardtanh): "
    "pixels that are exactly 0 or 1 get no gradient and cannot move, which overstates robust accuracy; "
    "twins_fast.models.pass_gradient_at_bounds(model) gives the published behaviour"
)

_IN_PLACE = (Tensor.clamp_, Tensor.clip_, torch.clamp_, torch.clip_)
_CLAMPS = (Tensor.clamp, Tensor.clip, torch.clamp, torch.clip, *_IN_PLACE)


def clamp(images: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """``images`` in [low, high], any shape and floating dtype; NaN stays.

    The derivative is 1 where ``low <= image <= high`` and 0 elsewhere, on every PyTorch release.
    """
    images = images.masked_fill(images < low, low)
    return images.masked_fill(images > high, high)


class ClampMode(TorchFunctionMode):
    """Watches, or replaces, every clamp of the images that runs inside the ``with`` block.

    Clamps of the images are those with bounds 0 and 1 (or one of them alone) of a tensor [N, ``channels``, H, W].

    Attributes:
        blocks: whether one of them has passed no gradient at its bounds.

    Args:
        channels: of the images.
        replace: whether :func:`clamp` runs instead.
    """

    def __init__(self, channels: int, replace: bool):
        super().__init__()
        self.blocks = False
        self._channels = channels
        self._replace = replace

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        bounds = _bounds(func, args, kwargs)
        if bounds is None or args[0].dim() != 4 or args[0].shape[1] != self._channels:
            return func(*args, **kwargs)
        if not self._replace:
            self.blocks |= func is F.hardtanh or not torch_passes_at_bounds()
            return func(*args, **kwargs)
        clamped = clamp(args[0], *bounds)
        return args[0].copy_(clamped) if func in _IN_PLACE or kwargs.get("inplace") else clamped


def _bounds(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """The bounds of a clamp to [0, 1] or to one side of it; None for any other call."""
    bounds: list[float | None]
    if func is F.hardtanh:
        names, bounds = ("min_val", "max_val"), [-1.0, 1.0]
    elif func in _CLAMPS:
        names, bounds = ("min", "max"), [None, None]
    else:
        return None
    for i, name in enumerate(names):
        bounds[i] = args[1 + i] if len(args) > 1 + i else kwargs.get(name, bounds[i])
    if any(isinstance(bound, Tensor) for bound in bounds) or bounds not in ([0, 1], [0, None], [None, 1]):
        return None
    low, high = bounds
    return (-float("inf") if low is None else float(low)), (float("inf") if high is None else float(high))


@cache
def torch_passes_at_bounds() -> bool:
    """Whether the derivative of this PyTorch's own ``clamp`` is 1 at its bounds."""
    x = torch.zeros(1, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(x.clamp(0, 1).sum(), x)
    return bool(gradient.item())


class PassGradientAtBounds(nn.Module):
    """``module`` with :func:`clamp` in place of its own clamps of the images to [0, 1]."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        with ClampMode(images.shape[1], replace=True):
            return self.module(images)


def pass_gradient_at_bounds(model: nn.Module) -> nn.Module:
    """A model that computes what ``model`` does, but whose clamps of the images to [0, 1] pass the gradient at 0 and 1.

    ``torch.clamp``, ``torch.clip`` and ``hardtanh`` with the bounds 0 and 1 on [N, C, H, W], C as in the images, are
    taken for such clamps, wherever the forward calls them. Parameters, buffers and train/eval mode are those of
    ``model``, which is the child ``module`` of the result and is not changed.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits.
    """
    return PassGradientAtBounds(model)
