"""Adversarial images of an attack in half precision, judged in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Attack = Callable[[Tensor, Tensor], Tensor]


def judged(
    model: nn.Module, half: nn.Module, images: Tensor, labels: Tensor, attack: Attack, again: Attack
) -> tuple[Tensor, int]:
    """Attack in half precision, and once more in float32 where the two networks disagree on the result.

    An attack leaves an image alone once its own network takes it for another class. Where that is rounding, and the
    float32 network still sees the right class, the image was given up too early and would count as robust: it is
    attacked again, in float32. So no image is robust because half precision took it for fooled. Whether an image is
    robust is up to the float32 network's view of what is returned.

    Args:
        model: the network in float32.
        half: the same network as ``attack`` sees it.
        images: [N, C, H, W] in [0, 1].
        labels: [N] int64, true classes.
        attack: ``(images, labels) -> adversarial images``, on ``half``.
        again: the same on the float32 network.

    Returns:
        The adversarial images, and how many were attacked again.
    """
    adversarial = attack(images, labels)
    with torch.no_grad():
        early = (half(adversarial).argmax(1) != labels) & (model(adversarial).argmax(1) == labels)
    if early.any():
        adversarial = adversarial.clone()
        adversarial[early] = again(images[early], labels[early])
    return adversarial, int(early.sum())
