"""Training of the head alone, on the features of the network as it was pre-trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from twins_fast.methods.at import AT
from twins_fast.methods.base import NOTHING, Beside, Logits, Method
from twins_fast.methods.standard import Standard
from twins_fast.nn.heads import head_of
from twins_fast.nn.modes import in_mode


@dataclass(frozen=True)
class HeadAlone(Method):
    """What the probes share: the body stays as it is, batch norm in evaluation mode (arXiv 2007.08489)."""

    def prepare(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        head_of(model).requires_grad_(True)
        return model

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return list(head_of(model).parameters())

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        adversarial: Tensor,
        largest_label: Tensor,
        beside: Beside = NOTHING,
    ) -> Logits:
        with in_mode(model, training=False):
            return super().forward(model, images, adversarial, largest_label)


@dataclass(frozen=True)
class LinearProbe(HeadAlone, Standard):
    """CE(f(x)) of the head alone: fixed-feature transfer (Salman et al., arXiv 2007.08489)."""

    name: ClassVar[str] = "linear-probe"


@dataclass(frozen=True)
class AdversarialLinearProbe(HeadAlone, AT):
    """CE(f(x_adv)) of the head alone, the attack going through the whole network (RoLI, arXiv 2312.05716)."""

    name: ClassVar[str] = "adversarial-linear-probe"
