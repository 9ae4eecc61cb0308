"""The attack, the layer and the helpers of the published TWINS code (https://github.com/ziquanliu/CVPR2023-TWINS)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.nn.published import MixBatchNorm2d
from twins_fast.validation import check_choice

__all__ = ["FastGradientSignUntargeted", "MixBatchNorm2d", "to_mix_status", "to_source_status", "to_target_status"]

_TYPES = {"linf": "linf", "l2": "l2-sign"}


class FastGradientSignUntargeted:
    """Projected gradient descent with sign steps, which ``_type="l2"`` only projects otherwise.

    Args:
        model: maps images to logits; ``forward_IN``, if it has one, to those of the pre-training.
        epsilon, alpha: radius and length of a step.
        min_val, max_val: range of the pixel values.
        max_iters: steps.
        _type: ``"linf"`` or ``"l2"``.
        engine, amp_dtype: of :class:`twins_fast.PGD`.
    """

    def __init__(
        self,
        model: nn.Module,
        epsilon: float,
        alpha: float,
        min_val: float,
        max_val: float,
        max_iters: int,
        _type: str = "linf",
        *,
        engine: str = "auto",
        amp_dtype: torch.dtype | None = None,
    ):
        check_choice("_type", _type, _TYPES)
        self.model, self.epsilon, self.alpha, self.max_iters, self._type = model, epsilon, alpha, max_iters, _type
        self.min_val, self.max_val, self.engine, self.amp_dtype = min_val, max_val, engine, amp_dtype

    def perturb(
        self, original_images: Tensor, labels: Tensor, reduction4loss: str = "mean", random_start: bool = False
    ) -> Tensor:
        """Adversarial images; the network is in train mode afterwards. Labels [N, classes] are of the pre-training."""
        network = self.model if labels.dim() == 1 else self.model.forward_IN
        return self._attacked(network, original_images, labels, reduction4loss, random_start)

    def perturb_IN(
        self, original_images: Tensor, labels: Tensor, reduction4loss: str = "mean", random_start: bool = False
    ) -> Tensor:
        """The same of the network's ``forward_IN``."""
        return self._attacked(self.model.forward_IN, original_images, labels, reduction4loss, random_start)

    def _attacked(self, network: Any, images: Tensor, labels: Tensor, reduction: str, random_start: bool) -> Tensor:
        check_choice("reduction4loss", reduction, ("mean", "sum", "none"))  # whose gradients have the same signs
        start = images.detach().clone()
        if random_start:  # drawn on the CPU there, too
            noise = torch.empty(images.shape).uniform_(-self.epsilon, self.epsilon)
            start = (start + noise.to(images)).clamp_(self.min_val, self.max_val)
        attack = PGD(
            network,
            self.epsilon,
            self.alpha,
            self.max_iters,
            norm=_TYPES[self._type],
            random_start=False,
            bounds=(self.min_val, self.max_val),
            engine=self.engine,
            amp_dtype=self.amp_dtype,
        )
        adversarial = attack(images, labels, x_init=start)
        self.model.train()
        return adversarial


def to_status(m: Any, status: str) -> None:
    """For ``model.apply``: which wing a layer uses, ``"target"``, ``"source"`` or ``"mix"``."""
    if hasattr(m, "batch_type"):
        m.batch_type = status


to_target_status = functools.partial(to_status, status="target")
to_source_status = functools.partial(to_status, status="source")
to_mix_status = functools.partial(to_status, status="mix")
