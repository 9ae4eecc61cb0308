"""TRADES: a clean loss, and a divergence that keeps adversarial predictions near clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.methods.at import AT
from twins_fast.methods.base import Logits, total
from twins_fast.validation import checked_logits


@dataclass(frozen=True)
class TRADES(AT):
    """CE(f(x)) + beta / B * KL_sum(f(x) || f(x_adv)) (arXiv 1901.08573).

    The adversarial images run first, then the clean ones, so that running statistics are updated in the
    published order.
    """

    name: ClassVar[str] = "trades"

    beta: float = 6.0
    """Weight of the KL term."""

    def forward(self, model: nn.Module, images: Tensor, adversarial: Tensor, largest_label: Tensor) -> Logits:
        trained_on = super().forward(model, images, adversarial, largest_label).adversarial
        return Logits(trained_on, checked_logits(model(images), len(images), largest_label))

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        adversarial, clean = logits
        if clean is None:
            raise ValueError(f"method {self.name!r} needs the logits of the clean images, too")
        rows = len(labels)
        divergence = total(weight / rows * _kl_sum(clean[part], adversarial[part]) for weight, part in self.parts(rows))
        return self._cross_entropy(clean, labels) + self.beta * divergence


def _kl_sum(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL_sum(clean || adversarial), with gradients through both, as in TRADES."""
    return F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="sum")
