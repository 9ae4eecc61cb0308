"""TWINS: the first half of the batch through the frozen wing, the second through the adaptive one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from twins_fast.methods.at import AT
from twins_fast.methods.base import Attack, Logits, Method, correct
from twins_fast.methods.mart import MART
from twins_fast.methods.trades import TRADES
from twins_fast.nn import convert_twin_bn, fuse_twin_bn
from twins_fast.nn.frozen import forget_statistics, frozen_wing_learns, share_affine, shuffle_statistics


@dataclass(frozen=True)
class TwoWings(Method):
    """What the TWINS methods share (arXiv 2303.11135); B // 2 rows are the frozen wing's."""

    wings: ClassVar[int] = 2

    frozen_weight: float = 1.0
    """Weight of the frozen wing's part of the loss, lambda in the paper."""
    frozen_statistics: Literal["pretrained", "target", "random"] = "pretrained"
    """Of the frozen wing: as pre-trained, of adversarial images in a warm-up stage, or as pre-trained but shuffled."""
    warmup_epochs: int = 1
    """Length of the warm-up stage in epochs, which train nothing else."""
    warmup_steps: int = 0
    """Steps of the warm-up stage, besides its epochs."""
    affine: Literal["separate", "shared"] = "separate"
    """Whether each wing has a weight and bias of its own."""

    def prepare(self, model: nn.Module) -> nn.Module:
        if not any(isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) for module in model.modules()):
            raise ValueError(
                f"method {self.name!r} gives each batch norm two wings, but the network has no BatchNorm2d; "
                f"use {super().name!r}"
            )
        model = convert_twin_bn(model)
        if self.affine == "shared":
            share_affine(model)
        if self.frozen_statistics == "random":
            shuffle_statistics(model)
        elif self.frozen_statistics == "target":
            forget_statistics(model)
        return fuse_twin_bn(model)

    def length_of_warmup(self, steps_per_epoch: int) -> int:
        target = self.frozen_statistics == "target"
        return self.warmup_epochs * steps_per_epoch + self.warmup_steps if target else 0

    def warm_up(self, attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        adversarial = self.perturb(attack, model, images, labels, self.check(model, images, labels))
        with frozen_wing_learns(model), torch.no_grad():
            model(adversarial)

    def parts(self, rows: int) -> list[tuple[float, slice]]:
        return [(self.frozen_weight, slice(0, rows // 2)), (1.0, slice(rows // 2, rows))]

    def metrics(self, logits: Logits, labels: Tensor) -> dict[str, Tensor]:
        right = correct(logits, labels)
        frozen, adaptive = (right[part].mean() for _, part in self.parts(len(labels)))
        with torch.no_grad():  # the loss is the frozen wing's, times its weight, plus the adaptive wing's
            both, adaptive_loss = (replace(self, frozen_weight=w).loss(logits, labels) for w in (1.0, 0.0))
        losses = {"frozen_loss": both - adaptive_loss, "adaptive_loss": adaptive_loss}
        return {"accuracy": right.mean(), "frozen_accuracy": frozen, "adaptive_accuracy": adaptive, **losses}


@dataclass(frozen=True)
class TwinsAT(TwoWings, AT):
    """lambda * CE(frozen half) + CE(adaptive half) of one forward of x_adv."""

    name: ClassVar[str] = "twins-at"


@dataclass(frozen=True)
class TwinsTRADES(TwoWings, TRADES):
    """TRADES on both wings.

    lambda * CE(clean, frozen half) + CE(clean, adaptive half)
    + beta / B * [lambda * KL_sum(frozen half) + KL_sum(adaptive half)]
    """

    name: ClassVar[str] = "twins-trades"


@dataclass(frozen=True)
class TwinsMART(TwoWings, MART):
    """MART on both wings; BCE is a mean over the rows of each half, the KL sums are divided by B as in TWINS-TRADES."""

    name: ClassVar[str] = "twins-mart"
