"""Adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from twins_fast.attacks import PGD, named_attack
from twins_fast.attacks.pgd import Adversary
from twins_fast.methods.base import Method


@dataclass(frozen=True)
class AT(Method):
    """CE(f(x_adv)) (Madry et al., arXiv 1706.06083)."""

    name: ClassVar[str] = "at"

    adversary: Adversary = "ce"
    """What the attack maximises: cross-entropy (the TWINS code's, for every method), or TRADES's own KL divergence."""

    def attack(self, model: nn.Module, **options: Any) -> PGD:
        return named_attack(self.adversary, model, **options)
