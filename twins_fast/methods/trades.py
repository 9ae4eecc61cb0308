"""TRADES: a clean loss, and a divergence that keeps adversarial predictions near clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from twins_fast.methods.at import AT
from twins_fast.methods.base import Logits, total


@dataclass(frozen=True)
class TRADES(AT):
    """CE(f(x)) + beta / B * KL_sum(f(x) || f(x_adv)) (arXiv 1901.08573).

    The adversarial images run first, then the clean ones, so that running statistics are updated in the
    published order.
    """

    name: ClassVar[str] = "trades"
    needs_clean: ClassVar[bool] = True

    beta: float = 6.0
    """Weight of the KL term."""

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        adversarial, clean = self._both(logits)
        rows = len(labels)
        divergence = total(weight / rows * _kl_sum(clean[part], adversarial[part]) for weight, part in self.parts(rows))
        return self._cross_entropy(clean, labels) + self.beta * divergence


def _kl_sum(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL_sum(clean || adversarial), with gradients through both, as in TRADES."""
    return F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="sum")
