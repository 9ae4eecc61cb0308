"""Training on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from twins_fast.methods.base import Logits, Method


@dataclass(frozen=True)
class Standard(Method):
    """CE(f(x)), without an adversary."""

    name: ClassVar[str] = "standard"

    def attack(self, model, **options) -> None:
        return None

    def perturb(self, attack, model, images, labels, largest_label, x_init=None) -> Tensor:
        return images

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        return self._cross_entropy(logits.adversarial, labels)
