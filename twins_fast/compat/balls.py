"""Balls as other codebases compute them: the same sets, other operations, and so other roundoff."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from twins_fast.attacks import PGD
from twins_fast.attacks.balls import Ball, Number, lengths


def into_l2(offset: Tensor, eps: Number) -> Tensor:
    """Offsets [N, C, H, W], shrunk to at most that length."""
    return offset * (eps / lengths(offset)).clamp(max=1)


@dataclass(frozen=True)
class OffsetBall(Ball):
    """Brings the offset into the ball and adds it to the clean image again."""

    division: float = 0.0  # added to the length that an L2 step divides by

    def step(self, x: Tensor, gradient: Tensor, alpha: Number) -> Tensor:
        if self.norm != "l2":
            return super().step(x, gradient, alpha)
        return x + alpha * (gradient / (lengths(gradient) + self.division))

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        offset = x - clean
        if self.norm == "linf":
            offset = torch.clamp(offset, -self.eps, self.eps)  # type: ignore[arg-type]  # both may be tensors
        else:
            offset = into_l2(offset, self.eps)
        return self.clamp(clean + offset)


@dataclass(frozen=True)
class PixelBall(Ball):
    """Only the range of the pixel values: for one step that cannot leave the ball."""

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        return self.clamp(x)


@dataclass(frozen=True)
class BoxFirstBall(Ball):
    """Brings the image into the range of the pixel values, then its offset into the L2 ball."""

    def project(self, x: Tensor, clean: Tensor) -> Tensor:
        return clean + into_l2(self.clamp(x) - clean, self.eps)


class BallPGD(PGD):
    """:class:`twins_fast.PGD` in another kind of ball, whose further fields are ``more``.

    The plan's fused step of the pixels is that of PGD itself: it may differ in the last bit.
    """

    def __init__(self, kind: type[Ball], *arguments: Any, more: dict[str, Any] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.kind, self.more = kind, more or {}

    def _ball(self, images: Tensor) -> Ball:
        ball = super()._ball(images)
        return self.kind(*(getattr(ball, field.name) for field in fields(Ball)), **self.more)
