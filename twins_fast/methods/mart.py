"""MART: an adversarial loss with a margin, and a divergence that counts most where the clean image is misclassified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from twins_fast.methods.at import AT
from twins_fast.methods.base import Logits, total
from twins_fast.validation import indexable

_MORE_THAN_ONE = 1.0001  # so that no logarithm of zero is asked for; as in the authors' code


@dataclass(frozen=True)
class MART(AT):
    """BCE(p_adv, y) + weight / B * sum_i KL(p_i || p_adv_i) * (1 - p_i[y_i]) (Wang et al., ICLR 2020).

    p = softmax(f(x)) and BCE(p, y) = -log p[y] - log(1 - max_{k != y} p[k]), a mean over its rows.
    """

    name: ClassVar[str] = "mart"
    needs_clean: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = False

    kl_weight: float = 5.0
    """Weight of the KL term, lambda in the paper."""

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        adversarial, clean = self._both(logits)
        rows = len(labels)
        own = indexable(labels, clean.shape[1])[:, None]
        log_probabilities = F.log_softmax(adversarial, 1)
        probabilities = log_probabilities.exp()
        strongest_other = probabilities.scatter(1, own, 0.0).amax(1)
        boosted = -log_probabilities.gather(1, own)[:, 0] - (_MORE_THAN_ONE - strongest_other).log()
        clean_probabilities = F.softmax(clean, 1)
        divergence = F.kl_div(log_probabilities, clean_probabilities, reduction="none").sum(1)
        unsure = divergence * (1 - clean_probabilities.gather(1, own)[:, 0])
        return total(
            weight * (boosted[part].mean() + self.kl_weight / rows * unsure[part].sum())
            for weight, part in self.parts(rows)
        )
