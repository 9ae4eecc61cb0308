"""Robust accuracy of a network under several attacks and radii, image by image, and resumable."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twins_fast
from twins_fast.deferred import raise_found
from twins_fast.evaluation.alarms import alarms, probe
from twins_fast.evaluation.judge import check_in_ball, judged
from twins_fast.evaluation.named import NamedAttack, Stage, Threat, as_attacked, attacks_named
from twins_fast.evaluation.record import Outcome, Record, digest
from twins_fast.evaluation.results import Column, Results, worst_case
from twins_fast.nn import wings
from twins_fast.nn.modes import in_mode
from twins_fast.validation import check_classes, check_images, check_labels


class Progress(Protocol):
    """Whom an evaluation tells how far it is."""

    def advance(self, images: float, shown: dict[str, str], known: bool) -> None:
        """So many images more; ``shown`` is for people; ``known`` if an earlier process had measured them."""


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: str | Iterable[str | NamedAttack] = "clean,pgd10",
    *,
    eps: float | Sequence[float] = 8 / 255,
    device: torch.device | str | None = None,
    wing: str | None = None,
    classes: Sequence[str] = (),
    record: Record | None = None,
    keep_images: bool = False,
    warn: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Results:
    """Accuracy of a network in eval mode under several attacks; ``str()`` of the result is a table.

    Every attack runs through the engine: PGD and APGD as :class:`twins_fast.PGD`, those of AutoAttack on
    :func:`twins_fast.accelerate`'s network. Attacks in half precision are judged by the float32 network
    (:func:`judged`). All attacks see a batch before the next one is read.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits.
        batches: of images float32 [N, C, H, W] in [0, 1] and labels int64 [N]; read once.
        attacks: names (:func:`attack_named`), separated by commas or one by one.
        eps: radius, or several.
        device: where to compute; None for where the model is.
        wing: ``"adaptive"`` (what None means too) or ``"frozen"``, for a model with two-wing layers.
        classes: their names.
        record: where outcomes are kept and looked up: an evaluation with the record of one that was killed goes on
            at the stage of the attack and the batch that it was at (AutoAttack has four stages).
        keep_images: whether the results hold all images, clean and adversarial.
        warn: whether to look for what the field takes as signs of a wrong evaluation (:attr:`Results.alarms`); that
            costs a few passes of 32 images.
        progress: is told of every stage.
        options: of :class:`Threat`: ``norm``, ``alpha``, ``amp_dtype``, ``engine``, ``chunk_size``, ``seed``.

    Raises:
        ValueError: no images, labels that the network has no class for, an unknown attack.
        RuntimeError: an attack left its ball.
    """
    named, radii = attacks_named(attacks), [eps] if isinstance(eps, (int, float)) else list(eps)
    threats = [Threat(eps=radius, **options) for radius in radii]
    if not threats or len(set(radii)) < len(radii):
        raise ValueError(f"eps must name each radius once, got {radii}")
    tried = [(attack, threat) for threat in threats for attack in named]
    found: list[list[list[Outcome]]] = [[] for _ in tried]  # of each attack, batch and stage
    pixels: list[Tensor] = []
    truth: list[Tensor] = []
    signs: list[str] = []
    record = Record() if record is None else record
    with in_mode(model, training=False), nullcontext() if wing is None else wings(model, wing):
        start = digest(twins_fast.__version__, torch.__version__, model, wing or "adaptive")
        for images, labels in batches:
            device = _device_of(model, images) if device is None else device
            with torch.autocast(torch.device(device).type, enabled=False):
                batch = _Batch(model, images.to(device), labels.to(device), start, record, keep_images)
                if warn and not truth and any(attack.attacks for attack in named):
                    signs = probe(model, batch.images, batch.labels, threats[0])
                for (attack, threat), outcomes in zip(tried, found, strict=True):
                    outcomes.append([])
                    for stage, outcome, known in batch.outcomes(attack, threat):
                        outcomes[-1].append(outcome)
                        if progress is not None:
                            part = stage.passes / sum(attack.passes for attack, _ in tried)
                            progress.advance(part * len(labels), _shown(tried, found, threat), known)
            pixels.append(images.cpu() if keep_images else images[:0].cpu())
            truth.append(labels.cpu())
    if not sum(map(len, truth)):
        raise ValueError("there are no test images to evaluate on")
    columns = [_column(attack, threat, outcomes) for (attack, threat), outcomes in zip(tried, found, strict=True)]
    if sum(bool(attack.attacks) for attack in named) > 1:
        rows = [[column for column in columns if column.eps == radius] for radius in radii]
        columns = [column for row in rows for column in (*row, worst_case(row))]
    labels = torch.cat(truth)
    names = tuple(classes) or tuple(map(str, range(int(labels.max()) + 1)))
    results = Results(tuple(columns), labels, threats[0].norm, names, (), torch.cat(pixels) if keep_images else None)
    return replace(results, alarms=(*signs, *alarms(results))) if warn else results


class _Batch:
    """Images that all attacks are tried on."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, start: str, record: Record, keeps: bool):
        check_images(images, model)
        largest = check_labels(labels, images)
        self.model, self.images, self.labels, self.record, self.keeps = model, images, labels, record, keeps
        self.key = digest(start, images, labels, images.device.type)
        with torch.no_grad():
            logits = model(images)
        check_classes(largest, logits.shape[1])
        raise_found()
        self.clean_loss = F.cross_entropy(logits, labels, reduction="none")

    def outcomes(self, attack: NamedAttack, threat: Threat) -> Iterator[tuple[Stage, Outcome, bool]]:
        """Of each stage, and whether it was known."""
        key, left, adversarial = self.key, torch.ones(len(self.labels), dtype=torch.bool), self.images
        for stage in attack.stages:
            key = digest(key, stage.about(threat))
            outcome = self.record.get(key)
            known = outcome is not None and (outcome.images is not None or not self.keeps)
            if outcome is None or not known:
                seeded = replace(threat, seed=int(key[:15], 16))
                outcome = self._attacked(stage, seeded, left, adversarial)
                self.record.add(key, outcome, f"{stage.title} of {attack.name}, eps {threat.eps:.6g}")
            yield stage, outcome, known
            left = outcome.right
            adversarial = self.images if outcome.images is None else outcome.images.to(self.images.device)

    def _attacked(self, stage: Stage, threat: Threat, left: Tensor, so_far: Tensor) -> Outcome:
        """What a stage makes of the images that are ``left``."""
        started, chosen = time.monotonic(), left.to(self.images.device)
        images, labels, clean_loss = self.images[chosen], self.labels[chosen], self.clean_loss[chosen]
        right, adversarial, loss = left.clone(), so_far, (0.0, 0.0)
        if len(labels):
            exact = stage.on(self.model, replace(threat, amp_dtype=None))
            if threat.amp_dtype is None:
                moved = exact(images, labels)
            else:
                half = as_attacked(self.model, threat)
                moved, _ = judged(self.model, half, images, labels, stage.on(self.model, threat), exact)
            check_in_ball(moved, images, threat.norm, threat.eps, stage.title)
            with torch.no_grad():
                logits = self.model(moved)
            right[left] = (logits.argmax(1) == labels).cpu()
            loss = (float(clean_loss.sum()), float(F.cross_entropy(logits, labels, reduction="sum")))
            adversarial = so_far.clone()
            adversarial[chosen] = moved
        raise_found()
        kept = adversarial.cpu() if self.keeps else None
        return Outcome(right, loss, len(labels), time.monotonic() - started, kept)


def _column(attack: NamedAttack, threat: Threat, batches: list[list[Outcome]]) -> Column:
    stages = list(zip(*batches, strict=True))
    after = tuple(
        (stage.title, torch.cat([outcome.right for outcome in outcomes]))
        for stage, outcomes in zip(attack.stages, stages, strict=True)
    )
    last = stages[-1]
    attacked = max(1, sum(outcome.attacked for outcome in last))
    before, behind = (sum(outcome.loss[side] for outcome in last) / attacked for side in (0, 1))
    kept = [outcome.images for outcome in last if outcome.images is not None]
    return Column(
        attack,
        threat.eps,
        after[-1][1],
        after if len(after) > 1 else (),
        (before, behind),
        sum(outcome.seconds for outcomes in stages for outcome in outcomes),
        torch.cat(kept) if len(kept) == len(last) else None,
    )


def _shown(tried: list[tuple[NamedAttack, Threat]], found: list[list[list[Outcome]]], threat: Threat) -> dict[str, str]:
    """The figures so far with this radius, of attacks that have seen a batch to its end."""
    shown = {}
    for (attack, its), batches in zip(tried, found, strict=True):
        whole = [batch[-1].right for batch in batches if len(batch) == len(attack.stages)]
        if its == threat and whole:
            shown[attack.title] = f"{float(torch.cat(whole).double().mean()):.1%}"
    return shown


def _device_of(model: nn.Module, images: Tensor) -> torch.device:
    first = next(chain(model.parameters(), model.buffers()), images)
    return first.device
