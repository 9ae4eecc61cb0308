"""``attack_pgd`` of https://github.com/locuslab/fast_adversarial: images are normalised, and so is all else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.compat.balls import BallPGD, OffsetBall
from twins_fast.compat.locuslab.restarts import highest, mode_of

cifar10_mean = (0.4914, 0.4822, 0.4465)
cifar10_std = (0.2471, 0.2435, 0.2616)


def attack_pgd(
    model: nn.Module,
    X: Tensor,
    y: Tensor,
    epsilon: Tensor,
    alpha: Tensor | float,
    attack_iters: int,
    restarts: int,
    opt: Any = None,
    *,
    lower_limit: Tensor | None = None,
    upper_limit: Tensor | None = None,
    engine: str = "auto",
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """The perturbation [N, C, H, W] with the highest loss; images that are fooled stay as they are.

    The network is attacked in the mode that it is in, by the engine in eval mode only.

    Args:
        model: maps normalised images to logits.
        X, y: normalised images and labels.
        epsilon, alpha: radius and length of a step in normalised units, [C, 1, 1].
        attack_iters, restarts: steps, and starts.
        opt: of apex.
        lower_limit, upper_limit: the normalised 0 and 1, [C, 1, 1]; None for CIFAR-10's.
        engine, amp_dtype: of :class:`twins_fast.PGD`.

    Raises:
        NotImplementedError: ``opt``.
    """
    if opt is not None:
        raise NotImplementedError("opt: apex scales nothing here; give amp_dtype=torch.float16 or torch.bfloat16")
    if lower_limit is None or upper_limit is None:
        mean, std = (torch.tensor(numbers).view(3, 1, 1).to(X) for numbers in (cifar10_mean, cifar10_std))
        lower_limit, upper_limit = (0 - mean) / std, (1 - mean) / std
    bounds = (lower_limit, upper_limit)
    attack = BallPGD(
        OffsetBall,
        model,
        epsilon,
        alpha,
        attack_iters,
        random_start=False,
        bn_mode=mode_of(model),
        early_stop=True,
        bounds=bounds,
        engine=engine,
        amp_dtype=amp_dtype,
    )

    def start() -> Tensor:
        noise = torch.zeros_like(X)
        for channel, radius in enumerate(epsilon.flatten().tolist()):
            noise[:, channel].uniform_(-radius, radius)
        return torch.maximum(torch.minimum(X + noise, upper_limit), lower_limit)

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), y, reduction="none")

    return highest(attack, X, y, restarts, start, loss)
