"""The short form of a method: one call for the loss of a batch."""

from __future__ import annotations

from torch import Tensor, nn

from twins_fast.attacks import named_attack
from twins_fast.methods.base import Attack
from twins_fast.methods.registry import METHODS
from twins_fast.options import known
from twins_fast.validation import check_choice, check_not_negative


def adversarial_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    method: str,
    attack: Attack | str = "ce",
    twins_lambda: float = 1.0,
    trades_beta: float = 6.0,
    x_init: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of ``method`` on one batch (B images, the first B // 2 on the frozen wing).

    - ``standard``: CE(f(x))
    - ``noise``: CE(f(x + noise)), the noise being that of the method's own attack
    - ``at``: CE(f(x_adv)) (Madry et al., arXiv 1706.06083)
    - ``trades``: CE(f(x)) + beta / B * KL_sum(f(x) || f(x_adv)) (arXiv 1901.08573)
    - ``mart``: BCE(f(x_adv)) + weight / B * sum(KL(f(x) || f(x_adv)) * (1 - p(y | x))) (ICLR 2020)
    - ``twins-at``: lambda * CE(frozen half) + CE(adaptive half) of one forward of x_adv
    - ``twins-trades``: lambda * CE(clean, frozen half) + CE(clean, adaptive half) +
      beta / B * [lambda * KL_sum(frozen half) + KL_sum(adaptive half)]
    - ``twins-mart``: MART on both halves, weighed in the same way
    - ``linear-probe``, ``adversarial-linear-probe``: CE(f(x)), CE(f(x_adv)), batch norm in eval mode

    CE is a mean over its rows. Methods that need x, too, run x_adv through the model first, so
    that running statistics are updated in the published order (TWINS: arXiv 2303.11135).

    Args:
        model: in train mode; with two-wing layers in mix mode for the two-wing methods, and
            without (or with ``wings(model, "adaptive")``) for the others.
        images: [B, C, H, W] floating point in [0, 1].
        labels: [B] int64.
        method: one of the above.
        attack: a callable ``(images, labels, x_init=None) -> adversarial images`` such as
            :class:`twins_fast.PGD`, or the name of an adversary: ``"ce"`` (that of the published code,
            so ``"published"`` names it too) or ``"trades"``.
        twins_lambda: weight of the frozen wing.
        trades_beta: weight of the KL term.
        x_init: where the attack starts; None leaves it to the attack.

    Returns:
        The loss (a scalar to call ``backward()`` on) and detached metrics: ``loss``, and accuracies
        in [0, 1] on the batch as it was trained on: ``accuracy`` and, for two-wing methods, ``frozen_accuracy`` and
        ``adaptive_accuracy``, with each wing's own loss, unweighted: ``frozen_loss`` and ``adaptive_loss``.

    Raises:
        TypeError, ValueError: bad images or labels, an unknown method, a negative weight, a model
            whose wings do not fit the method. Values on a GPU are not waited for: what is wrong with them is raised
            by a later call.
    """
    check_choice("method", method, METHODS)
    check_not_negative(twins_lambda=twins_lambda, trades_beta=trades_beta)
    chosen = known(METHODS[method], frozen_weight=twins_lambda, beta=trades_beta)
    if chosen.needs_pretrained:
        raise ValueError(f"method {method!r} keeps something of the pre-trained network: use TrainingStep")
    largest_label = chosen.check(model, images, labels)
    if isinstance(attack, str):
        attack = named_attack("ce" if attack == "published" else attack, model)
    adversarial = chosen.perturb(attack, model, images, labels, largest_label, x_init)
    logits = chosen.forward(model, images, adversarial, largest_label)
    loss = chosen.loss(logits, labels)
    return loss, {"loss": loss.detach(), **chosen.metrics(logits, labels)}
