"""Training on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from twins_fast.methods.base import Attack, Method


@dataclass(frozen=True)
class Standard(Method):
    """CE(f(x)), without an adversary."""

    name: ClassVar[str] = "standard"

    def attack(self, model: nn.Module, **options: Any) -> None:
        return None

    def perturb(
        self,
        attack: Attack | None,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        largest_label: Tensor,
        x_init: Tensor | None = None,
    ) -> Tensor:
        return images
