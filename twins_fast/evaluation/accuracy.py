"""Accuracy of a network, clean and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twins_fast.deferred import raise_found
from twins_fast.evaluation.judge import right
from twins_fast.nn import wings
from twins_fast.nn.modes import in_mode
from twins_fast.ops.group import Group, member, together


@dataclass(frozen=True)
class Accuracy:
    """Fractions in [0, 1] over ``images`` test images."""

    clean: float
    robust: float
    images: int


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: Callable[..., Tensor],
    *,
    device: torch.device | str = "cpu",
    wing: str | None = None,
    process_group: Group = None,
) -> Accuracy:
    """Clean and robust accuracy in eval mode; every module's train/eval flag is put back.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits.
        batches: of images float32 [N, C, H, W] in [0, 1] and labels int64 [N].
        attack: ``(images, labels) -> adversarial images``, of this model, on ``device``.
        device: where the model is, and batches are moved to.
        wing: ``"adaptive"`` (what None means too) or ``"frozen"``, for a model with two-wing layers.
        process_group: processes that measure batches of their own, perhaps none, and count together; None for this
            process alone.

    Returns:
        Fractions of all images, those of all processes included.

    Raises:
        ValueError: no images; a ``wing`` of a model without two-wing layers.
    """
    clean = robust = total = 0
    chosen_wing = nullcontext() if wing is None else wings(model, wing)
    with in_mode(model, training=False), chosen_wing:
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            adversarial = attack(images, labels)
            clean += int(right(model, images, labels).sum())
            robust += int(right(model, adversarial, labels).sum())
            raise_found()  # the batch has been waited for
            total += len(labels)
    if process_group is not None:
        counts = torch.tensor([clean, robust, total], device=device)
        with together():
            dist.all_reduce(counts, group=member(process_group))
        clean, robust, total = counts.tolist()
    if total == 0:
        raise ValueError("there are no test images to evaluate on")
    return Accuracy(clean / total, robust / total, total)
