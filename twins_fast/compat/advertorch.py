"""Attacks of advertorch (https://github.com/BorealisAI/advertorch): change the import.

``from twins_fast.compat.advertorch import LinfPGDAttack`` in place of ``from advertorch.attacks import LinfPGDAttack``.
As there, a network is attacked in the mode that it is in; in train mode without the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.attacks.balls import Ball
from twins_fast.compat.balls import BallPGD, BoxFirstBall, OffsetBall, into_l2

Predict = nn.Module | Callable[[Tensor], Tensor]


class PGDAttack:
    """Projected gradient descent.

    Args:
        predict: maps images [N, C, H, W] to logits.
        loss_fn: ``(logits, labels) -> []``, which autograd differentiates; None for the cross-entropy.
        eps, eps_iter: radius, and the length of a step: a number, or one for each image, [N].
        nb_iter: steps.
        rand_init: whether to start at random.
        clip_min, clip_max: range of the pixel values: numbers, or one for each channel, [C, 1, 1].
        ord: ``inf`` or 2.
        l1_sparsity: of the L1 norm.
        targeted: whether labels are targets.
        engine, amp_dtype: of :class:`twins_fast.PGD`.

    Raises:
        NotImplementedError: ``ord=1`` or ``l1_sparsity``; no ``clip_min`` or ``clip_max``, or one for each pixel.
    """

    def __init__(
        self,
        predict: Predict,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        eps: float | Tensor = 0.3,
        nb_iter: int = 40,
        eps_iter: float | Tensor = 0.01,
        rand_init: bool = True,
        clip_min: float | Tensor = 0.0,
        clip_max: float | Tensor = 1.0,
        ord: float = torch.inf,
        l1_sparsity: float | None = None,
        targeted: bool = False,
        *,
        engine: str = "auto",
        amp_dtype: torch.dtype | None = None,
    ):
        if ord not in (2, torch.inf):
            raise NotImplementedError(f"ord={ord}: take twins_fast.PGD(norm='l1'), whose steps are other ones")
        if l1_sparsity is not None:
            raise NotImplementedError("l1_sparsity: take twins_fast.PGD(norm='l1')")
        for name, bound in {"clip_min": clip_min, "clip_max": clip_max}.items():
            if bound is None or (isinstance(bound, Tensor) and bound.dim() and bound.shape[-2:] != (1, 1)):
                raise NotImplementedError(f"{name}: give a number, or one for each channel, [C, 1, 1]")
        self.predict, self.loss_fn, self.eps, self.nb_iter, self.eps_iter = predict, loss_fn, eps, nb_iter, eps_iter
        self.rand_init, self.clip_min, self.clip_max, self.ord = rand_init, clip_min, clip_max, ord
        self.targeted, self.engine, self.amp_dtype = targeted, engine, amp_dtype

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Any:
        """Adversarial images like ``x`` [N, C, H, W]; without labels ``y`` away from what the network says itself."""
        if y is None:
            if self.targeted:
                raise ValueError("a targeted attack needs targets y")
            with torch.no_grad():
                y = self.predict(x).argmax(1)
        return self._attack()(x, y, x_init=self._start(x) if self.rand_init else None)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.perturb(*arguments, **options)

    def _attack(self) -> PGD:
        training = isinstance(self.predict, nn.Module) and self.predict.training
        return BallPGD(
            self._ball,
            self.predict,
            _by_image(self.eps),
            _by_image(self.eps_iter),
            self.nb_iter,
            norm=self.ord,
            loss="ce" if self.loss_fn is None or is_cross_entropy(self.loss_fn) else _each(self.loss_fn),
            bn_mode="train" if training else "eval",
            random_start=False,
            targeted=self.targeted,
            bounds=(self.clip_min, self.clip_max),
            engine=self.engine,
            amp_dtype=self.amp_dtype,
        )

    @property
    def _ball(self) -> type[Ball]:
        return OffsetBall if self.ord == torch.inf else BoxFirstBall

    def _start(self, x: Tensor) -> Tensor:
        noise = torch.empty_like(x)
        if self.ord == torch.inf:
            noise = noise.uniform_(-1, 1) * _by_image(self.eps)
        else:
            noise.uniform_(self.clip_min, self.clip_max)  # type: ignore[arg-type]  # which takes numbers only
            noise = into_l2(noise - x, _by_image(self.eps))
        start = (x + noise).clamp(min=self.clip_min)
        return start.clamp(max=self.clip_max)


class _OfOneNorm(PGDAttack):
    """The constructor of both."""

    norm: float

    def __init__(
        self,
        predict: Predict,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        eps: float | Tensor = 0.3,
        nb_iter: int = 40,
        eps_iter: float | Tensor = 0.01,
        rand_init: bool = True,
        clip_min: float | Tensor = 0.0,
        clip_max: float | Tensor = 1.0,
        targeted: bool = False,
        **options: Any,
    ):
        numbers = (predict, loss_fn, eps, nb_iter, eps_iter, rand_init, clip_min, clip_max, self.norm)
        super().__init__(*numbers, targeted=targeted, **options)


class LinfPGDAttack(_OfOneNorm):
    """:class:`PGDAttack` in the L-infinity ball."""

    norm = torch.inf


class L2PGDAttack(_OfOneNorm):
    """:class:`PGDAttack` in the L2 ball."""

    norm = 2


def is_cross_entropy(loss: Any) -> bool:
    """Whose mean and sum lead to the same steps."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is None and not loss.label_smoothing and loss.ignore_index < 0
    return loss is F.cross_entropy


def _by_image(number: float | Tensor) -> float | Tensor:
    return number.view(-1, 1, 1, 1) if isinstance(number, Tensor) and number.dim() == 1 else number


def _each(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of a batch as one of its images, each of which has an equal part: the gradient is that of the batch."""

    def values(logits: Tensor, labels: Tensor) -> Tensor:
        found = loss(logits, labels)
        return found if found.shape == labels.shape[:1] else found.expand(len(labels)) / len(labels)

    return values
