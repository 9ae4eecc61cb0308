"""What both have in common: restarts, of which the perturbation with the highest loss counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.nn.modes import modules_of


def mode_of(model: nn.Module) -> str:
    """In which it is attacked: as it is."""
    return "train" if any(module.training for module in modules_of(model)) else "eval"


def highest(
    attack: PGD,
    images: Tensor,
    labels: Tensor,
    restarts: int,
    start: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """The perturbation of the highest loss, [N, C, H, W].

    Args:
        attack: without a random start.
        images, labels: of a batch.
        restarts: how many starts.
        start: draws one.
        loss: of perturbed images, [N].
    """
    found = torch.zeros_like(images)
    most = torch.zeros(len(images), device=images.device)
    for _ in range(restarts):
        adversarial = attack(images, labels, x_init=start())
        with torch.no_grad():
            height = loss(adversarial)
        higher = height >= most
        found = torch.where(higher.view(-1, 1, 1, 1), adversarial - images, found)
        most = torch.maximum(most, height)
    return found
