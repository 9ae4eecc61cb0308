"""Joint training: the pre-training goes on beside the task at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.methods.at import AT
from twins_fast.methods.base import NOTHING, Beside, Logits
from twins_fast.nn.heads import SOURCE_HEAD, with_head
from twins_fast.validation import check_labels, checked_logits, indexable


@dataclass(frozen=True)
class Joint(AT):
    """CE(f(x_adv)) + weight * CE(g(s_adv)): s are images of the pre-training, g has their head (arXiv 2303.11135).

    The attack on s has half the radius and half the step. The images of the task run through the body first, and both
    batches move its running statistics.
    """

    name: ClassVar[str] = "joint"
    needs_pretrained: ClassVar[bool] = True
    needs_source: ClassVar[bool] = True

    source_weight: float = 0.3
    """Weight of the loss on the images of the pre-training."""

    def keep(self, model: nn.Module, attack: PGD) -> PGD:
        options = {name: value for name, value in vars(attack).items() if not name.startswith("_")}
        halves = {"eps": attack.eps / 2, "alpha": attack.alpha / 2}
        return PGD(**{**options, **halves, "model": with_head(model, model.get_submodule(SOURCE_HEAD))})

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        adversarial: Tensor,
        largest_label: Tensor,
        beside: Beside = NOTHING,
    ) -> Logits:
        if beside.source is None:
            raise ValueError(f"method {self.name!r} needs images of the pre-training in every step: source=")
        source, labels = beside.source
        attacked = beside.kept(source, labels)
        logits = super().forward(model, images, adversarial, largest_label)
        network = with_head(model, model.get_submodule(SOURCE_HEAD))
        on_source = checked_logits(network(attacked), len(source), check_labels(labels, source))
        return logits._replace(penalty=F.cross_entropy(on_source, indexable(labels, on_source.shape[1])))

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + self.source_weight * self._penalty(logits)
