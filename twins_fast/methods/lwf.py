"""Learning without forgetting: features that stay near those of the pre-trained network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twins_fast.methods.base import NOTHING, Beside, Logits
from twins_fast.methods.standard import Standard
from twins_fast.nn.heads import features, head_of, with_head
from twins_fast.validation import checked_logits


@dataclass(frozen=True)
class LwF(Standard):
    """CE(f(x)) + weight * mean ||z(x) - z0(x)||_1, on clean images (Shafahi et al., ICLR 2020, arXiv 1905.08232).

    z are the features that the head is given, z0 those of the pre-trained network in evaluation mode, which stays as it
    was: what is robust about them is to last without an attack.
    """

    name: ClassVar[str] = "lwf"
    needs_pretrained: ClassVar[bool] = True

    feature_weight: float = 0.005
    """Weight of the distance between the features."""

    def keep(self, model: nn.Module, attack: Any) -> nn.Module:
        return with_head(copy.deepcopy(model), nn.Identity()).eval().requires_grad_(False)

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        adversarial: Tensor,
        largest_label: Tensor,
        beside: Beside = NOTHING,
    ) -> Logits:
        found = features(model, adversarial)
        with torch.no_grad():
            before = beside.kept(adversarial)
        distance = (found - before).float().flatten(1).norm(p=1, dim=1).mean()
        return Logits(checked_logits(head_of(model)(found), len(images), largest_label), penalty=distance)

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + self.feature_weight * self._penalty(logits)
