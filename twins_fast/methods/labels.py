"""Labels as the loss sees them."""

from __future__ import annotations

from torch import Tensor

from twins_fast.attacks.objectives import one_hot


def smoothed(labels: Tensor, classes: int, amount: float) -> Tensor:
    """``amount`` of each label spread over all classes (arXiv 1512.00567); ``labels`` themselves for 0.

    Args:
        labels: [B] int64, or probabilities [B, classes].
        classes: how many there are.
        amount: in [0, 1].
    """
    if amount == 0:
        return labels
    probabilities = labels if labels.is_floating_point() else one_hot(labels, classes)
    return (1 - amount) * probabilities + amount / classes
