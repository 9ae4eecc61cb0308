"""Attacks by name: what ``pgd100`` or ``autoattack`` means, and how it is made for a network."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.attacks import PGD, accelerate
from twins_fast.attacks.balls import NORMS, norm_named
from twins_fast.evaluation.judge import Attack
from twins_fast.evaluation.record import digest
from twins_fast.nn.guards import random_numbers_restored
from twins_fast.validation import check_amp_dtype, check_choice, check_not_negative, check_radius

EXAMPLES = "clean, pgd10, pgd20x5, apgd, apgd-dlr, apgd-t, fab-t, square, autoattack, autoattack-plus, autoattack-rand"
_VERSIONS = {  # as pyautoattack has them
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # so many logits stand in these losses
_SILENT = logging.Logger("silent")
_SILENT.disabled = True


@dataclass(frozen=True)
class Threat:
    """Where attacks may go, and how they compute: what all attacks of an evaluation share; as :class:`PGD`'s options.

    Attributes:
        seed: of what is random.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    alpha: float = 2 / 255
    amp_dtype: torch.dtype | None = None
    engine: str = "auto"
    chunk_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", norm_named(self.norm))
        check_choice("norm", self.norm, NORMS)
        check_not_negative(eps=self.eps, alpha=self.alpha, seed=self.seed)
        check_radius(self.norm, self.eps)
        check_amp_dtype(self.amp_dtype)


def as_attacked(model: nn.Module, threat: Threat) -> Callable[[Tensor], Tensor]:
    """The network in the precision and by the engine of its attacks."""
    accelerated = accelerate(model, threat.amp_dtype)
    return accelerated.itself if threat.engine == "eager" else accelerated


@dataclass(frozen=True)
class Stage:
    """A part of an attack: it goes for the images that the stages before it have left."""

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """About how many forward passes an image takes; a step counts as three."""
        raise NotImplementedError

    def about(self, threat: Threat) -> str:
        """All that its images depend on besides network and images."""
        return f"{self} {threat}"

    def on(self, model: nn.Module, threat: Threat) -> Attack:
        """``(images, labels) -> adversarial images`` for a network in eval mode."""
        raise NotImplementedError


@dataclass(frozen=True)
class Clean(Stage):
    title = "clean"
    passes = 1

    def about(self, threat: Threat) -> str:
        return "clean"

    def on(self, model: nn.Module, threat: Threat) -> Attack:
        return lambda images, labels: images


@dataclass(frozen=True)
class Ascent(Stage):
    """PGD by the engine. One run starts at the image, as published; several, and APGD, start at random and stop early.

    Attributes:
        steps, restarts, rule, loss: as :class:`PGD` has them.
    """

    steps: int
    restarts: int = 1
    rule: str = "fixed"
    loss: str = "ce"

    @property
    def title(self) -> str:
        name = f"PGD-{self.steps}"
        if self.rule == "apgd":
            name = f"APGD-{self.loss.upper()}" + (f"-{self.steps}" if self.steps != 100 else "")
        return name + (f", {self.restarts} restarts" if self.restarts > 1 else "")

    @property
    def passes(self) -> int:
        return 3 * self.steps * self.restarts

    def on(self, model: nn.Module, threat: Threat) -> Attack:
        searches = self.restarts > 1 or self.rule == "apgd"
        return PGD(
            model,
            threat.eps,
            threat.alpha,
            self.steps,
            random_start=searches,
            norm=threat.norm,
            loss=self.loss,
            amp_dtype=threat.amp_dtype,
            generator=torch.Generator().manual_seed(threat.seed),
            engine=threat.engine,
            chunk_size=threat.chunk_size,
            restarts=self.restarts,
            early_stop=searches,
            step_rule=self.rule,
        )


@dataclass(frozen=True)
class Part(Stage):
    """One attack of AutoAttack (arXiv 2003.01690), by pyautoattack, on the accelerated network.

    Attributes:
        name: one of pyautoattack's.
        version: whose settings it has.
        budget: its iterations or, of Square, queries; None for as many as are usual.
    """

    name: str
    version: str = "standard"
    budget: int | None = None

    @property
    def title(self) -> str:
        name = "Square" if self.name == "square" else self.name.upper()
        return name if self.budget is None else f"{name}-{self.budget}"

    @property
    def passes(self) -> int:
        if self.name == "square":
            return self.budget or 5000
        return 3 * (self.budget or 100) * (9 if self.name in ("apgd-t", "fab-t") else 1)

    def about(self, threat: Threat) -> str:
        own = replace(threat, alpha=0.0, chunk_size=None)  # which have no meaning here
        return f"{self} {own} pyautoattack {importlib.metadata.version('pyautoattack')}"

    def on(self, model: nn.Module, threat: Threat) -> Attack:
        network = as_attacked(model, threat)

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                classes = network(images[:1]).shape[1]
            least = _LEAST_CLASSES.get(self.name, 2)
            if classes < least:
                raise ValueError(f"{self.title} needs at least {least} classes, the network has {classes}")
            if not threat.eps:
                return images
            with random_numbers_restored():
                made = self._made(network, threat, classes, images.device)
                adversarial, *_ = made.run_standard_evaluation(images.contiguous(), labels, batch_size=len(images))
            return adversarial

        return attack

    def _made(self, network: Any, threat: Threat, classes: int, device: torch.device) -> Any:
        from pyautoattack import AutoAttack  # only needed here

        norm = {"linf": "Linf", "l1": "L1"}.get(threat.norm, "L2")
        made = AutoAttack(network, norm=norm, eps=threat.eps, seed=threat.seed, device=device, version=self.version)
        made.attacks_to_run = [self.name]
        made.logger = made.apgd.logger = made.apgd_targeted.logger = _SILENT  # what it looks for, alarms.py tells
        for targeted in (made.apgd_targeted, made.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        if self.budget is not None:
            made.square.n_queries = made.fab.n_iter = self.budget
            for apgd in (made.apgd, made.apgd_targeted):
                apgd.n_iter = apgd.n_iter_orig = self.budget
        return made


@dataclass(frozen=True)
class Transfer(Stage):
    """An attack on another network, of which the one that is measured sees the result."""

    stage: Stage
    source: nn.Module

    @property
    def title(self) -> str:
        return f"{self.stage.title} of another network"

    @property
    def passes(self) -> int:
        return self.stage.passes

    def about(self, threat: Threat) -> str:
        return f"transfer {digest(self.source)} {self.stage.about(threat)}"

    def on(self, model: nn.Module, threat: Threat) -> Attack:
        return self.stage.on(self.source, threat)


@dataclass(frozen=True)
class NamedAttack:
    """An attack of an evaluation.

    Attributes:
        name: as it is asked for.
        title: as people write it.
        stages: in turn; an image that one of them fools is left alone by those after it.
    """

    name: str
    title: str
    stages: tuple[Stage, ...]

    @property
    def passes(self) -> int:
        return sum(stage.passes for stage in self.stages)

    @property
    def attacks(self) -> tuple[Stage, ...]:
        """The stages that change images."""
        return tuple(stage for stage in self.stages if not isinstance(stage, Clean))


def attack_named(name: str) -> NamedAttack:
    """An attack by name.

    ``clean`` is none. ``pgd100`` is PGD-100 from the image itself, ``pgd20x5`` with 5 random starts of which any may
    fool. ``apgd`` (or ``apgd-ce``) and ``apgd-dlr`` are APGD of 100 steps, ``apgd50`` of 50. Those are this package's;
    pyautoattack's are ``apgd-t``, ``fab``, ``fab-t``, ``square`` (``square500`` has 500 queries), ``autoattack``,
    ``autoattack-plus``, ``autoattack-rand`` and ``autoattack:apgd-ce+square``, a choice with the standard settings.

    Raises:
        ValueError: no such attack.
    """
    if name == "clean":
        return NamedAttack(name, "clean", (Clean(),))
    ascent = re.fullmatch(r"(a?)pgd(?:(?<=apgd)-(ce|dlr))?(\d*)(?:x(\d+))?", name)
    if ascent and (ascent[1] or ascent[3]) and ascent[4] != "0":
        steps, restarts, rule = int(ascent[3] or 100), int(ascent[4] or 1), "apgd" if ascent[1] else "fixed"
        stage = Ascent(steps, restarts, rule, ascent[2] or "ce")
        return NamedAttack(name, stage.title, (stage,))
    version = re.fullmatch(r"autoattack(?:-(plus|rand))?", name)
    if version:
        parts = tuple(Part(part, version[1] or "standard") for part in _VERSIONS[version[1] or "standard"])
        title = f"AutoAttack {version[1]}" if version[1] else "AutoAttack"
        return NamedAttack(name, title, (Clean(), *parts))
    chosen = [re.fullmatch(r"([a-z-]+?)(\d*)", word) for word in name.removeprefix("autoattack:").split("+")]
    parts = tuple(Part(m[1], budget=int(m[2]) if m[2] else None) for m in chosen if m and m[1] in _PARTS)
    is_list = name.startswith("autoattack:")
    if len(parts) < len(chosen) or (len(parts) > 1 and not is_list):
        raise ValueError(f"unknown attack {name!r}; choose from {EXAMPLES}, autoattack:apgd-ce+square")
    title = " + ".join(part.title for part in parts)
    return NamedAttack(name, f"AutoAttack ({title})" if is_list else title, (Clean(), *parts))


def transfer(name: str, source: nn.Module) -> NamedAttack:
    """The attack of a name on another network, ``source``; the one that is measured sees its images.

    Raises:
        ValueError: no such attack, or one that is none or several in turn.
    """
    (stage,) = attack_named(name).attacks
    made = Transfer(stage, source)
    return NamedAttack("transfer", made.title, (Clean(), made))


def attacks_named(attacks: str | Iterable[str | NamedAttack]) -> tuple[NamedAttack, ...]:
    """Attacks by name, or separated by commas, or as they are.

    Raises:
        ValueError: there is none, one twice, or an unknown one.
    """
    words = [word.strip() for word in attacks.split(",")] if isinstance(attacks, str) else list(attacks)
    made = tuple(attack_named(word) if isinstance(word, str) else word for word in words)
    names = [attack.name for attack in made]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks must name each attack once, got {', '.join(names) or 'none'}")
    return made
