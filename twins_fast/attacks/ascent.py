"""The loop of an attack: passes of a network, and steps on the images, for every norm, loss and step rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor

from twins_fast.attacks.balls import Ball, Number
from twins_fast.attacks.objectives import Objective

_TINY = 1e-12


class Network(Protocol):
    """A network as an attack sees it."""

    def logits(self, x: Tensor) -> Tensor:
        """[n, classes] of images [n, C, H, W]."""

    def gradient(self, x: Tensor, logits_gradient: Tensor) -> Tensor:
        """That of the images of the last :meth:`logits`, from theirs."""


@dataclass
class Images:
    """Images that are attacked, all tensors [n, ...].

    Attributes:
        clean: the centres of the balls.
        reference: what the loss compares logits with.
        labels: int64 [n], by which an image counts as fooled.
        ball, alpha: with a number per image where the user gave one.
    """

    clean: Tensor
    reference: Tensor
    labels: Tensor
    ball: Ball
    alpha: Number

    def at(self, rows: Any) -> Images:
        """Those at ``rows``: a slice, indices or a mask."""
        count = len(self.clean)

        def pick(value: Number) -> Number:
            return value[rows] if isinstance(value, Tensor) and len(value) == count else value

        parts = (self.clean[rows], self.reference[rows], self.labels[rows])
        return Images(*parts, self.ball.of(pick), pick(self.alpha))


@dataclass(frozen=True)
class Search:
    """How an attack looks for an adversarial image.

    Attributes:
        steps: of the gradient.
        objective: what is to grow.
        targeted: whether labels are to be reached, not left.
        momentum: of the gradient's direction, 0 for none (MI-FGSM, Dong et al., arXiv 1710.06081, eq. 6).
        rule: ``"fixed"`` or ``"apgd"``.
        best: whether the highest iterate counts, not the last one.
        early_stop: whether an image stays at its first iterate that fools the network.
        judged: whether the result's height and success are asked for.
    """

    steps: int
    objective: Objective
    targeted: bool = False
    momentum: float = 0.0
    rule: str = "fixed"
    best: bool = False
    early_stop: bool = False
    judged: bool = False


@dataclass
class Found:
    """What a search has found.

    Attributes:
        x: images [n, C, H, W].
        height, fooled: [n], of the objective there and whether the network fails; the least and False if nobody asked.
        nan: int64 [n], how many gradients of pixel values were NaN.
    """

    x: Tensor
    height: Tensor
    fooled: Tensor
    nan: Tensor

    def take(self, chosen: Tensor, x: Tensor, height: Tensor, fooled: Tensor) -> None:
        """Take over the ``chosen`` ones, bool [n]."""
        self.x = _where(chosen, x, self.x)
        self.height = torch.where(chosen, height, self.height)
        self.fooled = torch.where(chosen, fooled, self.fooled)

    def take_higher(self, other: Found, early_stop: bool) -> None:
        """Take over where another search got higher or, where fooling ends it, was the first to fool."""
        better = other.height > self.height
        if early_stop:
            better = (better | other.fooled) & ~self.fooled
        self.take(better, other.x, other.height, other.fooled)
        self.nan = self.nan + other.nan

    def put(self, rows: Any, other: Found) -> None:
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[rows] = its

    def at(self, rows: Any) -> Found:
        return Found(*(t[rows] for t in vars(self).values()))


def nothing_found(x: Tensor) -> Found:
    """The start of a search: images ``x`` that are as low as can be."""
    count = len(x)
    lowest = torch.full((count,), -torch.inf, dtype=torch.float32, device=x.device)
    no = torch.zeros(count, dtype=torch.bool, device=x.device)
    return Found(x.clone(), lowest, no, torch.zeros(count, dtype=torch.int64, device=x.device))


def ascend(network: Network, x: Tensor, images: Images, search: Search, drops: bool = False) -> Found:
    """Search from ``x``.

    Args:
        drops: whether fooled images of an early stop leave the batch; they must not influence the others in it.
    """
    found = nothing_found(x)
    drops = drops and search.early_stop
    everything, places = (nothing_found(x), torch.arange(len(x), device=x.device)) if drops else (found, None)
    rule = _RULES[search.rule](search)
    climbs = search.best or search.rule == "apgd"
    judged = climbs or search.judged  # up to the last iterate
    for number in range(search.steps + judged):
        logits = network.logits(x)
        height = None
        if judged or search.early_stop:
            height = search.objective.height(logits, images.reference).float()
            fooled = (logits.argmax(1) == images.labels) == search.targeted
            better = height > found.height if climbs else torch.ones_like(fooled)
            if search.early_stop:
                better = (better | fooled) & ~found.fooled
            found.take(better, x, height, fooled)
        if number == search.steps:
            break
        gradient = network.gradient(x, search.objective.gradient(logits, images.reference))
        bad = gradient.isnan()
        found.nan += bad.flatten(1).sum(1)
        moved = rule.step(number, x, gradient.masked_fill(bad, 0), height, images)
        x = torch.where(bad, x, images.ball.project(moved, images.clean))
        if not judged:
            found.x = _where(found.fooled, found.x, x) if search.early_stop else x
        if places is not None:
            everything.put(places, found)
            left = ~found.fooled
            places, x, images, found, rule = places[left], x[left], images.at(left), found.at(left), rule.at(left)
            if not len(x):
                break
    if places is not None:
        everything.put(places, found)
    return everything


class FixedRule:
    """Steps of one length, along the gradient or its momentum."""

    def __init__(self, search: Search, velocity: Tensor | None = None):
        self._search = search
        self._velocity = velocity

    def at(self, rows: Any) -> FixedRule:
        return FixedRule(self._search, None if self._velocity is None else self._velocity[rows])

    def step(self, number: int, x: Tensor, gradient: Tensor, height: Tensor | None, images: Images) -> Tensor:
        """``x`` after step ``number``; not projected."""
        if self._search.momentum:
            # By its mean, not its sum: the same direction, and the bits of other implementations.
            gradient = gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(_TINY)
            if self._velocity is not None:
                gradient += self._search.momentum * self._velocity
            self._velocity = gradient
        return images.ball.step(x, gradient, images.alpha)


@dataclass
class _Climb:
    """Where the APGD step rule has got to; all tensors [n, ...]."""

    before: Tensor  # the iterate before
    height: Tensor  # there
    best: Tensor
    best_gradient: Tensor
    best_height: Tensor
    rate: Tensor  # length of a step
    rises: Tensor  # steps upwards since the last checkpoint
    checked: Tensor  # best height at the last checkpoint
    reduced: Tensor  # whether the rate was halved there


class ApgdRule:
    """Steps that begin with twice the ball's radius and are halved where they lead nowhere, and momentum.

    Croce and Hein, arXiv 2003.01690, algorithm 1; the length that the user gave has no meaning here.
    """

    MOMENTUM, RISING = 0.75, 0.75  # alpha and rho there

    def __init__(self, search: Search, state: _Climb | None = None, checked: int = 0):
        self._search = search
        self._state = state
        self._checked = checked  # the last checkpoint
        self._checkpoints = set(checkpoints(search.steps))

    def at(self, rows: Any) -> ApgdRule:
        state = self._state and _Climb(*(t[rows] for t in vars(self._state).values()))
        return ApgdRule(self._search, state, self._checked)

    def step(self, number: int, x: Tensor, gradient: Tensor, height: Tensor, images: Images) -> Tensor:
        """``x`` after step ``number``; not projected."""
        state = self._state
        if state is None:
            no = torch.zeros_like(height, dtype=torch.bool)
            rate = (2 * images.ball.eps) * torch.ones_like(x[:, :, :1, :1])
            self._state = state = _Climb(x, height, x, gradient, height, rate, no.long(), height, no)
        else:
            state.rises = state.rises + (height > state.height)
            better = height > state.best_height
            state.best = _where(better, x, state.best)
            state.best_gradient = _where(better, gradient, state.best_gradient)
            state.best_height = torch.maximum(height, state.best_height)
        if number in self._checkpoints:
            lazy = state.rises < self.RISING * (number - self._checked)
            reduce = lazy | (~state.reduced & (state.best_height <= state.checked))
            state.rate = _where(reduce, state.rate / 2, state.rate)
            x, gradient = _where(reduce, state.best, x), _where(reduce, state.best_gradient, gradient)
            state.reduced, state.checked, state.rises = reduce, state.best_height, torch.zeros_like(state.rises)
            self._checked = number
        target = images.ball.project(images.ball.step(x, gradient, state.rate), images.clean)
        part = self.MOMENTUM if number else 1.0
        moved = x + part * (target - x) + (1 - part) * (x - state.before)
        state.before, state.height = x, height
        return moved


_RULES = {"fixed": FixedRule, "apgd": ApgdRule}
RULES = tuple(_RULES)


def checkpoints(steps: int) -> Iterator[int]:
    """The steps before which APGD looks whether to halve its rate (arXiv 2003.01690, section 3.1)."""
    last, part = 0.0, 0.22
    while part < 1:
        yield ceil(round(part * steps, 6))  # 57, not the next of 57.00000000000001
        last, part = part, part + max(part - last - 0.03, 0.06)


def _where(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """By image."""
    return torch.where(chosen.view(-1, 1, 1, 1), yes, no)
