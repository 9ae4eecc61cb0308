"""What an attack maximises: a number per sample, [N], from float logits [N, classes]; and its gradient, [N, classes].

The gradients are those of the sum over the samples, in closed form: on a GPU they take a few launches, and no autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.validation import indexable

_TINY = 1e-12

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [N, classes], labels) -> [N]


@dataclass(frozen=True)
class Objective:
    """A loss per sample, with a sign.

    Attributes:
        values: the loss [N] of logits [N, classes] and what they are compared with.
        slope: its gradient with respect to the logits, where it is known in closed form.
        sign: 1 to go up, -1 to go down.
        reduce: what autograd differentiates instead, a function [N] -> [].
    """

    values: Loss
    slope: Loss | None = None
    sign: int = 1
    reduce: Callable[[Tensor], Tensor] = torch.sum

    def height(self, logits: Tensor, reference: Tensor) -> Tensor:
        """What is to grow, [N]; least where it is NaN."""
        values = (self.sign * self._checked(logits, reference)).detach()
        return torch.where(values.isnan(), -torch.inf, values)

    def gradient(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Its gradient, [N, classes]."""
        if self.slope is not None:
            slope = self.slope(logits, reference)
            return slope.neg_() if self.sign < 0 else slope
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            values = self._checked(leaf, reference)
            if not values.requires_grad:
                raise TypeError("loss does not depend on the logits, or not by operations that have a gradient")
            return torch.autograd.grad(self.sign * self.reduce(values), leaf)[0]

    def _checked(self, logits: Tensor, reference: Tensor) -> Tensor:
        values = self.values(logits, reference)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"loss must return a tensor [{len(logits)}], one number per image, got {got}")
        return values


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], [N], for int64 ``labels`` [N]; for probabilities [N, classes] their mean of it."""
    return F.cross_entropy(logits, indexable(labels, logits.shape[1]), reduction="none")


def kl_divergence(logits: Tensor, clean_probabilities: Tensor) -> Tensor:
    """KL(clean || adversarial), [N], for ``clean_probabilities`` [N, classes] (TRADES, arXiv 1901.08573)."""
    return F.kl_div(F.log_softmax(logits, 1), clean_probabilities, reduction="none").sum(1)


def softmax_gradient(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Of :func:`kl_divergence` and, for probabilities as labels, :func:`cross_entropy`: softmax - probabilities."""
    return F.softmax(logits, 1).sub_(probabilities)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """float32 [..., classes] of int64 ``labels`` [...]; on a GPU nothing waits for their values."""
    return (labels[..., None] == torch.arange(classes, device=labels.device)).float()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{i != y} z_i - z_y, [N], for int64 ``labels`` [N] (Carlini and Wagner, arXiv 1608.04644, f_6).

    Raises:
        ValueError: fewer than two classes.
    """
    own, other = logits.gather(1, _rivals(logits, labels)).unbind(1)
    return other - own


def margin_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Of :func:`margin`, with its errors."""
    own, other = one_hot(_rivals(logits, labels), logits.shape[1]).unbind(1)
    return (other - own).to(logits.dtype)


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


def _rivals(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, 2]: the label, and the class of the largest logit but its."""
    if logits.shape[1] < 2:
        raise ValueError(f"loss='margin' needs at least 2 classes, got {logits.shape[1]}")
    first, second = logits.topk(2, dim=1).indices.unbind(1)
    return torch.stack([indexable(labels, logits.shape[1]), torch.where(first == labels, second, first)], 1)


def _ranked(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, 4]: the same two, and the classes of the largest and of the third largest logit."""
    if logits.shape[1] < 3:
        raise ValueError(f"loss='dlr' needs at least 3 classes, got {logits.shape[1]}")
    first, _, third = logits.topk(3, dim=1).indices.unbind(1)
    return torch.cat([_rivals(logits, labels), torch.stack([first, third], 1)], 1)
