"""``attack_pgd`` of https://github.com/locuslab/robust_overfitting: images in [0, 1], which it normalises itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks.balls import lengths
from twins_fast.attacks.objectives import one_hot
from twins_fast.compat.balls import BallPGD, OffsetBall
from twins_fast.compat.locuslab.restarts import highest, mode_of
from twins_fast.compat.normalised import normalised
from twins_fast.nn.modes import in_mode
from twins_fast.validation import check_choice

cifar10_mean = (0.4914, 0.4822, 0.4465)
cifar10_std = (0.2471, 0.2435, 0.2616)
_NORMS = {"l_inf": "linf", "l_2": "l2"}


def attack_pgd(
    model: nn.Module,
    X: Tensor,
    y: Tensor,
    epsilon: float,
    alpha: float,
    attack_iters: int,
    restarts: int,
    norm: str,
    early_stop: bool = False,
    mixup: bool = False,
    y_a: Tensor | None = None,
    y_b: Tensor | None = None,
    lam: float | None = None,
    *,
    mean: tuple[float, ...] = cifar10_mean,
    std: tuple[float, ...] = cifar10_std,
    engine: str = "auto",
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """The perturbation [N, C, H, W] with the highest loss.

    The network is attacked in the mode that it is in, by the engine in eval mode only.

    Args:
        model: maps normalised images to logits.
        X, y: images in [0, 1] and labels.
        epsilon, alpha: radius and length of a step.
        attack_iters, restarts: steps, and starts.
        norm: ``"l_inf"`` or ``"l_2"``.
        early_stop: whether images that are fooled stay as they are.
        mixup, y_a, y_b, lam: labels lam * y_a + (1 - lam) * y_b.
        mean, std: by which images are normalised, C numbers each.
        engine, amp_dtype: of :class:`twins_fast.PGD`.

    Raises:
        ValueError: an unknown norm, or mixup without its labels.
        NotImplementedError: early_stop with mixup.
    """
    check_choice("norm", norm, _NORMS)
    if mixup and early_stop:
        raise NotImplementedError("early_stop=True with mixup=True: a mixed image has no label to be judged by")
    network = normalised(model, mean, std, X.device)
    labels = y
    if mixup:
        if y_a is None or y_b is None or lam is None:
            raise ValueError("mixup=True needs y_a, y_b and lam")
        with torch.no_grad(), in_mode(model, training=False):
            classes = model(X[:1]).shape[1]
        labels = lam * one_hot(y_a, classes) + (1 - lam) * one_hot(y_b, classes)
    attack = BallPGD(
        OffsetBall,
        network,
        epsilon,
        alpha,
        attack_iters,
        norm=_NORMS[norm],
        random_start=False,
        bn_mode=mode_of(model),
        early_stop=early_stop,
        engine=engine,
        amp_dtype=amp_dtype,
        more={"division": 1e-10},
    )

    def start() -> Tensor:
        if norm == "l_inf":
            noise = torch.zeros_like(X).uniform_(-epsilon, epsilon)
        else:
            noise = torch.zeros_like(X).normal_()
            length = lengths(noise)
            noise = noise * (torch.zeros_like(length).uniform_(0, 1) / length * epsilon)
        return (X + noise).clamp(0, 1)

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(network(images).float(), labels, reduction="none")

    return highest(attack, X, labels, restarts, start, loss)
