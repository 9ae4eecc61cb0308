"""What becomes of adversarial images: attacks in half precision are seen in float32, and no image leaves its ball."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Attack = Callable[[Tensor, Tensor], Tensor]
ROUNDOFF = 1e-5  # by which an image may miss its ball: relative to the radius, and a tenth of it in pixel values


def right(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Of which images [N, C, H, W] the largest logit is the label's; bool [N]."""
    with torch.no_grad():
        return model(images).argmax(1) == labels


def judged(
    model: nn.Module,
    half: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    again: Attack,
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
    early = ~right(half, adversarial, labels) & right(model, adversarial, labels)
    if early.any():
        adversarial = adversarial.clone()
        adversarial[early] = again(images[early], labels[early])
    return adversarial, int(early.sum())


def check_in_ball(adversarial: Tensor, images: Tensor, norm: str, eps: float, attack: str) -> None:
    """Require adversarial images within ``eps`` of the clean ones and in [0, 1], up to roundoff.

    Raises:
        RuntimeError: they are not; ``attack`` is named.
    """
    order = {"linf": torch.inf, "l1": 1.0}.get(norm, 2.0)
    farthest = float(torch.linalg.vector_norm((adversarial - images).double().flatten(1), order, 1).max())
    least, most = (float(bound) for bound in adversarial.aminmax())
    tiny = ROUNDOFF / 10
    if not (farthest <= eps * (1 + ROUNDOFF) + tiny and least >= -tiny and most <= 1 + tiny):  # NaN is outside, too
        raise RuntimeError(
            f"{attack} left the ball: up to {farthest:.6g} away, where eps is {eps:.6g} ({norm}), "
            f"pixels from {least:.6g} to {most:.6g}; its figures would be of no use"
        )
