"""What the field takes as signs that a robustness evaluation is wrong, as sentences with the figures.

After Athalye et al., arXiv 1802.00420, section 3.1, and Carlini et al., arXiv 1902.06705, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twins_fast.evaluation.judge import right
from twins_fast.evaluation.named import Ascent, NamedAttack, Part, Threat, Transfer
from twins_fast.evaluation.results import WORST, Column, Results

PROBED = 32  # images
_SURE = 2.0  # standard errors of the difference of two attacks on the same images
_SAME = 1e-4  # relative difference of logits, and rise of the loss, that roundoff may make


def probe(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> list[str]:
    """Signs that a few images show, [n, C, H, W] in [0, 1]; the model is in eval mode."""
    images, labels = images[:PROBED], labels[:PROBED]
    looks: tuple[Callable[..., str], ...] = (random_outputs, zero_gradients, boundless)
    return list(filter(None, (look(model, images, labels, threat) for look in looks)))


def alarms(results: Results) -> list[str]:
    """Signs that the figures show."""
    found: list[str] = []
    for eps in results.radii:
        columns = [column for column in results.at(eps) if column.name != WORST]
        found += [*weaker_wins(columns), *blind_wins(columns), *square_wins(columns), *flat_loss(columns)]
    return [*found, *smaller_radius_wins(results.columns)]


def random_outputs(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> str:
    with torch.no_grad():
        first, second = model(images), model(images)
    apart, scale = float((first - second).abs().max()), float(first.abs().max())
    if apart <= _SAME * scale:
        return ""
    moved = int((first.argmax(1) != second.argmax(1)).sum())
    return (
        f"the network's outputs are random: two passes over the same {len(images)} images differ by up to {apart:.3g} "
        f"in logits up to {scale:.3g}, in the class of {moved}; an attack has to average over them (autoattack-rand)"
    )


def zero_gradients(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> str:
    """In float32; where the softmax has saturated or a layer passes nothing, gradient attacks see nothing."""
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True) if loss.requires_grad else (None,)
    count = len(images) if gradient is None else int((gradient.flatten(1) == 0).all(1).sum())
    if not count:
        return ""
    return f"the gradient of {count} of {len(images)} images is zero, so that gradient attacks do not move them"


def boundless(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> str:
    """With a radius at which every image can be made grey, an attack fools every image."""
    size = images[0].numel()
    eps = {"linf": 0.5, "l1": 0.5 * size}.get(threat.norm, 0.5 * sqrt(size))
    wide = replace(threat, eps=eps, alpha=eps / 10, amp_dtype=None)
    attack = Ascent(50, 2)  # stops at what it fools, in a few steps
    left = int(right(model, attack.on(model, wide)(images, labels), labels).sum())
    if left <= 0.01 * len(images):
        return ""
    return (
        f"a large eps does not reach 0: {attack.title}, with eps {eps:g} ({threat.norm}), where every image can be "
        f"made grey, leaves {left} of {len(images)} images right"
    )


def weaker_wins(columns: Sequence[Column]) -> list[str]:
    """Attacks that fool fewer images than a weaker one."""
    return [
        f"{strong.full_title} is the stronger attack and scores higher than {weak.title}: {_figures(strong, weak)}"
        for weak in columns
        for strong in columns
        if _is_weaker(weak.attack, strong.attack) and _fools_more(weak, strong)
    ]


def blind_wins(columns: Sequence[Column]) -> list[str]:
    """Attacks that see no gradient of this network, and fool more images than the best that does."""
    white = [column for column in columns if column.attack.attacks and all(map(_sees_gradients, column.attack.attacks))]
    blind = [
        column for column in columns if column.attack.attacks and not any(map(_sees_gradients, column.attack.attacks))
    ]
    best = min(white, key=lambda column: column.accuracy, default=None)
    return [
        f"{column.full_title}, which sees no gradient of this network, beats {best.title}, which does: "
        f"{_figures(column, best)}"
        for column in blind
        if best is not None and _fools_more(column, best)
    ]


def square_wins(columns: Sequence[Column]) -> list[str]:
    """AutoAttack's own alarm: Square fools what its gradient attacks have left."""
    found = []
    for column in columns:
        for (before, left), (title, after) in zip(column.after, column.after[1:], strict=False):
            fooled = int(left.sum() - after.sum())
            if title.startswith("Square") and before != "clean" and fooled > 0.002 * len(left):
                found.append(
                    f"Square, which sees no gradient, fools {fooled} of the {int(left.sum())} images that the attacks "
                    f"before it in {column.full_title} have left"
                )
    return found


def flat_loss(columns: Sequence[Column]) -> list[str]:
    found = []
    for column in columns:
        before, after = column.loss
        if len(column.attack.attacks) == 1 and isinstance(column.attack.attacks[0], Ascent) and column.eps:
            if after - before <= _SAME * max(before, 1e-3):
                found.append(f"the loss does not rise under {column.full_title}: from {before:.4g} to {after:.4g}")
    return found


def smaller_radius_wins(columns: Iterable[Column]) -> list[str]:
    """Attacks that fool fewer images in a larger ball."""
    own = [column for column in columns if column.attack.attacks]
    return [
        f"{large.full_title} scores higher than with the smaller eps: {_figures(large, small)}"
        for small in own
        for large in own
        if small.name == large.name and small.eps < large.eps and _fools_more(small, large)
    ]


def _fools_more(one: Column, other: Column) -> bool:
    """By more than chance leaves: of the images that the two see in different ways."""
    here, there = int((~one.right & other.right).sum()), int((one.right & ~other.right).sum())
    return here - there > _SURE * sqrt(here + there)


def _figures(one: Column, other: Column) -> str:
    return f"{one.accuracy:.1%} and {other.accuracy:.1%} of {len(one.right)} images"


def _is_weaker(weak: NamedAttack, strong: NamedAttack) -> bool:
    """Whether all that an attack does the other one does, too, or as much of it."""
    own, its = weak.attacks, strong.attacks
    if len(own) == len(its) == 1 and isinstance(own[0], Ascent) and isinstance(its[0], Ascent):
        less, more = own[0], its[0]
        as_long = less.steps <= more.steps and less.restarts <= more.restarts
        return less != more and as_long and less.loss == more.loss and more.rule in (less.rule, "apgd")
    if len(its) > 1:
        usual = any(isinstance(part, Part) and part.name == "apgd-ce" and part.budget is None for part in its)
        return all(stage in its or (usual and isinstance(stage, Ascent)) for stage in own) and own != its
    return bool(its) and not own


def _sees_gradients(stage: object) -> bool:
    return not (isinstance(stage, Transfer) or (isinstance(stage, Part) and stage.name == "square"))
