"""What the attack maximises: one number per sample, [N], from float logits [N, classes]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], [N], for int64 ``labels`` [N]."""
    return F.cross_entropy(logits, labels, reduction="none")


def kl_divergence(logits: Tensor, clean_probabilities: Tensor) -> Tensor:
    """KL(clean || adversarial), [N], for ``clean_probabilities`` [N, classes] (TRADES, arXiv 1901.08573)."""
    return F.kl_div(F.log_softmax(logits, 1), clean_probabilities, reduction="none").sum(1)


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR, [N]: -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)) for int64 ``labels`` [N] (arXiv 2003.01690, eq. 6).

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"loss='dlr' needs at least 3 classes, got {logits.shape[1]}")
    ordered, index = logits.sort(1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    correct = index[:, -1] == labels
    best_other = ordered[:, -1].where(~correct, ordered[:, -2])
    return -(own - best_other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)
