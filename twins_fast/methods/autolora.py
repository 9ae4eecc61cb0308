"""AutoLoRa: the clean images go through a low-rank branch, the adversarial ones through the body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.methods.at import AT
from twins_fast.methods.base import NOTHING, Beside, Logits, correct
from twins_fast.nn.low_rank import BRANCH, add_branch, through_branch
from twins_fast.options import check_options
from twins_fast.validation import checked_logits


@dataclass(frozen=True)
class AutoLoRa(AT):
    """(1 - a) * CE(g(x)) + a * CE(f(x_adv)) + scale * a / B * KL_sum(g(x) || f(x_adv)) (ICLR 2024, arXiv 2310.01818).

    g is the network with a low-rank branch beside its convolutions, and moves the branch and the head alone; f is the
    network without it, which remains after training. a is the accuracy of g: on this batch, where the authors measure
    it on the training set, four times per epoch. Their learning rate is scheduled by validation, as
    ``--optimizer.schedule auto`` does.
    """

    name: ClassVar[str] = "autolora"
    needs_clean: ClassVar[bool] = True
    dropped: ClassVar[tuple[str, ...]] = (BRANCH,)

    rank: int = 8
    """Rank of the branch."""
    kl_scale: float = 6.0
    """Weight of the KL term, for an accuracy of one."""

    def __post_init__(self) -> None:
        check_options(self, least={"rank": 1})

    def prepare(self, model: nn.Module) -> nn.Module:
        return add_branch(model, self.rank)

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        adversarial: Tensor,
        largest_label: Tensor,
        beside: Beside = NOTHING,
    ) -> Logits:
        trained_on = checked_logits(model(adversarial), len(images), largest_label)
        return Logits(trained_on, checked_logits(through_branch(model, images), len(images), None))

    def loss(self, logits: Logits, labels: Tensor) -> Tensor:
        adversarial, clean = self._both(logits)
        accuracy = correct(Logits(clean), labels).mean()
        divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
        natural, robust = self._cross_entropy(clean, labels), self._cross_entropy(adversarial, labels)
        return (1 - accuracy) * natural + accuracy * (robust + self.kl_scale * divergence)
