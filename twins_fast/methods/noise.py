"""Standard training on images with noise in place of an attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.methods.base import Attack, Method
from twins_fast.options import known


@dataclass(frozen=True)
class Noise(Method):
    """CE(f(x + noise)): what is left of robust training without an adversary (a control of arXiv 2007.08489)."""

    name: ClassVar[str] = "noise"

    distribution: Literal["uniform", "gaussian"] = "uniform"
    """Uniform in the ball of the attack, or Gaussian as long as its longest perturbation (root mean square)."""

    def attack(self, model: nn.Module, **options: Any) -> Attack:
        if self.distribution == "uniform":  # a random start, and no step
            return PGD(model, **{**options, "steps": 0, "engine": "eager"})
        return known(Gaussian, **options)


@dataclass(frozen=True)
class Gaussian:
    """Adds noise to images [N, C, H, W] in [0, 1], and clamps them."""

    norm: str = "linf"
    eps: float = 8 / 255

    def __call__(self, images: Tensor, labels: Tensor, x_init: Tensor | None = None) -> Tensor:
        start = images if x_init is None else x_init
        pixels = 1 if self.norm == "linf" else images[0].numel() ** 0.5
        return (start + self.eps / pixels * torch.randn_like(images)).clamp(0, 1)
