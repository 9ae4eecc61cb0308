"""Adversarial losses of every method: pure functions of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.attacks import named_attack
from twins_fast.nn import TwinBatchNorm2d
from twins_fast.validation import check_choice, check_images, check_labels, check_not_negative, checked_logits

METHODS = ("standard", "at", "trades", "twins-at", "twins-trades")

Attack = Callable[..., Tensor]


def adversarial_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    method: str,
    attack: Attack | str = "published",
    twins_lambda: float = 1.0,
    trades_beta: float = 6.0,
    x_init: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of ``method`` on one batch (B images, the first B // 2 on the frozen wing).

    ========================  ==================================================================
    ``standard``              CE(f(x))
    ``at``                    CE(f(x_adv)) (Madry et al., arXiv 1706.06083)
    ``trades``                CE(f(x)) + beta / B * KL_sum(f(x) || f(x_adv)) (arXiv 1901.08573)
    ``twins-at``              lambda * CE(frozen half) + CE(adaptive half) of one forward of x_adv
    ``twins-trades``          lambda * CE(clean, frozen half) + CE(clean, adaptive half)
                              + beta / B * [lambda * KL_sum(frozen half) + KL_sum(adaptive half)]
    ========================  ==================================================================

    CE is a mean over its rows. The two TRADES methods run x_adv through the model first, then x, so
    that running statistics are updated in the published order (TWINS: arXiv 2303.11135).

    Args:
        model: in train mode; with two-wing layers in mix mode for the ``twins-`` methods, and
            without (or with ``wings(model, "adaptive")``) for the others.
        images: [B, C, H, W] floating point in [0, 1].
        labels: [B] int64.
        method: one of the above.
        attack: a callable ``(images, labels, x_init=None) -> adversarial images`` such as
            :class:`twins_fast.PGD`, or the name of an adversary: ``"published"`` or ``"trades"``.
        twins_lambda: weight of the frozen wing.
        trades_beta: weight of the KL term.
        x_init: where the attack starts; None leaves it to the attack.

    Returns:
        The loss (a scalar to call ``backward()`` on) and detached metrics: ``loss``, and accuracies
        in [0, 1] on the batch as it was trained on: ``accuracy`` and, for two-wing methods,
        ``frozen_accuracy`` and ``adaptive_accuracy``.

    Raises:
        TypeError, ValueError: bad images or labels, an unknown method, a negative weight, a model
            whose wings do not fit the method.
    """
    check_choice("method", method, METHODS)
    check_not_negative(twins_lambda=twins_lambda, trades_beta=trades_beta)
    check_images(images, model)
    largest_label = check_labels(labels, images)
    two_wing = method.startswith("twins-")
    _check_wings(model, method, two_wing)
    rows = images.shape[0]
    if rows < (2 if two_wing else 1):
        raise ValueError(f"method {method!r} needs at least {2 if two_wing else 1} image(s), got {rows}")

    if method == "standard":
        trained_on = clean = checked_logits(model(images), rows, largest_label)
    else:
        if isinstance(attack, str):
            attack = named_attack(attack, model)
        adversarial_images = attack(images, labels, x_init=x_init)
        trained_on = clean = checked_logits(model(adversarial_images), rows, largest_label)
        if method.endswith("trades"):
            clean = checked_logits(model(images), rows, largest_label)

    wings = [slice(0, rows // 2), slice(rows // 2, rows)] if two_wing else [slice(0, rows)]
    weights = [twins_lambda, 1.0] if two_wing else [1.0]
    loss = sum(weight * F.cross_entropy(clean[wing], labels[wing]) for weight, wing in zip(weights, wings, strict=True))
    if method.endswith("trades"):
        divergence = sum(
            weight / rows * _kl_sum(clean[wing], trained_on[wing]) for weight, wing in zip(weights, wings, strict=True)
        )
        loss = loss + trades_beta * divergence

    correct = (trained_on.detach().argmax(1) == labels).float()
    metrics = {"loss": loss.detach(), "accuracy": correct.mean()}
    if two_wing:
        metrics["frozen_accuracy"], metrics["adaptive_accuracy"] = (correct[wing].mean() for wing in wings)
    return loss, metrics


def _kl_sum(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL_sum(clean || adversarial), with gradients through both, as in TRADES."""
    return F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="sum")


def _check_wings(model: nn.Module, method: str, two_wing: bool) -> None:
    if two_wing and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(f"method {method!r} cannot use nn.DataParallel: each replica would split its own rows")
    layers = [module for module in model.modules() if isinstance(module, TwinBatchNorm2d)]
    mixing = [layer.wing == "mix" or (layer.wing is None and layer.training) for layer in layers]
    if two_wing and not (layers and all(mixing)):
        state = "has no two-wing layers (see convert_twin_bn)" if not layers else "is not in mix mode (call train())"
        raise ValueError(f"method {method!r} needs two-wing layers in mix mode, but the model {state}")
    if not two_wing and any(mixing):
        raise ValueError(
            f"method {method!r} sends the whole batch through one batch norm, but the model's two-wing layers are in "
            'mix mode; use revert_twin_bn, or wings(model, "adaptive")'
        )
