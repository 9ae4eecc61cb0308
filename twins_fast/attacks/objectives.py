"""What the attack maximises: a number per sample, [N], from float logits [N, classes]; and its gradient, [N, classes].

The gradients are those of the sum over the samples, in closed form: on a GPU they take a few launches, and no autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.validation import indexable

_TINY = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], [N], for int64 ``labels`` [N]."""
    return F.cross_entropy(logits, indexable(labels, logits.shape[1]), reduction="none")


def kl_divergence(logits: Tensor, clean_probabilities: Tensor) -> Tensor:
    """KL(clean || adversarial), [N], for ``clean_probabilities`` [N, classes] (TRADES, arXiv 1901.08573)."""
    return F.kl_div(F.log_softmax(logits, 1), clean_probabilities, reduction="none").sum(1)


def softmax_gradient(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Of :func:`kl_divergence`, and of :func:`cross_entropy` with :func:`one_hot` labels: softmax - probabilities."""
    return F.softmax(logits, 1).sub_(probabilities)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """float32 [..., classes] of int64 ``labels`` [...]; on a GPU nothing waits for their values."""
    return (labels[..., None] == torch.arange(classes, device=labels.device)).float()


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR, [N]: -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)) for int64 ``labels`` [N] (arXiv 2003.01690, eq. 6).

    Raises:
        ValueError: fewer than three classes.
    """
    own, best_other, largest, third_largest = logits.gather(1, _ranked(logits, labels)).unbind(1)
    return -(own - best_other) / (largest - third_largest + _TINY)


def difference_of_logits_ratio_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Of :func:`difference_of_logits_ratio`, with its errors."""
    index = _ranked(logits, labels)
    own, best_other, largest, third_largest = logits.gather(1, index).unbind(1)
    width = largest - third_largest + _TINY
    slope = (best_other - own) / width.square()
    terms = torch.stack([-1 / width, 1 / width, -slope, slope], 1)
    return (one_hot(index, logits.shape[1]) * terms[..., None]).sum(1)  # a class may be there twice


def _ranked(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, 4]: the label, the class of the largest logit but its, of the largest, and of the third largest."""
    if logits.shape[1] < 3:
        raise ValueError(f"loss='dlr' needs at least 3 classes, got {logits.shape[1]}")
    first, second, third = logits.topk(3, dim=1).indices.unbind(1)
    return torch.stack(
        [indexable(labels, logits.shape[1]), torch.where(first == labels, second, first), first, third], 1
    )
