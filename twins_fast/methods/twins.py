"""TWINS: the first half of the batch through the frozen wing, the second through the adaptive one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from twins_fast.methods.at import AT
from twins_fast.methods.base import Logits, Method, correct
from twins_fast.methods.mart import MART
from twins_fast.methods.trades import TRADES
from twins_fast.nn import convert_twin_bn, fuse_twin_bn


@dataclass(frozen=True)
class TwoWings(Method):
    """What the TWINS methods share (arXiv 2303.11135); B // 2 rows are the frozen wing's."""

    wings: ClassVar[int] = 2

    frozen_weight: float = 1.0
    """Weight of the frozen wing's part of the loss, lambda in the paper."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return fuse_twin_bn(convert_twin_bn(model))

    def parts(self, rows: int) -> list[tuple[float, slice]]:
        return [(self.frozen_weight, slice(0, rows // 2)), (1.0, slice(rows // 2, rows))]

    def metrics(self, logits: Logits, labels: Tensor) -> dict[str, Tensor]:
        right = correct(logits, labels)
        frozen, adaptive = (right[part].mean() for _, part in self.parts(len(labels)))
        return {"accuracy": right.mean(), "frozen_accuracy": frozen, "adaptive_accuracy": adaptive}


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
