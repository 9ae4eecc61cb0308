"""Passes of some images through a plan: forward to the logits, and back to the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twins_fast.attacks.engine.executors.pixels import Input
from twins_fast.attacks.engine.executors.segment import Segment

LARGEST_EXPONENT = 126  # of a power of two in float32, or nearly


@dataclass
class Bound:
    """The steps of both passes over ``rows`` images, with their tensors.

    Attributes:
        saved: uint8 [rows, bytes], all that a backward pass reads of its forward pass, besides the images.
    """

    rows: int
    forward: list[Callable[[], None]]
    backward: list[Callable[[], None]]
    tensors: list[Tensor]  # by slot
    image: Tensor
    image_gradient: Tensor
    logits: Tensor
    logits_gradient: Tensor
    saved: Tensor


@dataclass
class Kept:
    """What a backward pass needs of a forward pass that others have followed.

    Attributes:
        saved: a copy of :attr:`Bound.saved`.
        segments: PyTorch's graph of each segment.
        bound: where their tensors lie, if there are any; the others may lie anywhere.
    """

    saved: Tensor | None
    segments: list[Any] = field(default_factory=list)
    bound: Bound | None = None


class Pass:
    """A forward pass of some images, and the backward pass from it: the network as an attack sees it.

    Attributes:
        bound: steps for as many images, or for more.
    """

    def __init__(self, bound: Bound, input: Input, segments: list[Segment]):
        self.bound = bound
        self._input = input
        self._segments = segments
        self._prepared = False  # whether the first layer's operand is there

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits [n, classes] of float32 images ``x``, good until the next pass."""
        if not self._prepared:
            self.prepare(x)
        self._prepared = False
        _run(self.bound.forward)
        return self.bound.logits[: len(x)].float()

    def prepare(self, x: Tensor) -> None:
        """What the first layers read."""
        self._input.prepare(x, self.bound.image[: len(x)])
        if len(x) < self.bound.rows:
            self.bound.image[len(x) :].zero_()

    def gradient(self, x: Tensor, logits_gradient: Tensor) -> Tensor:
        """The gradient of ``x``, float32, from that of their logits, float32 [n, classes]."""
        exponents = self._backward(logits_gradient)
        gradient = self._input.gradient(x, self.bound.image_gradient[: len(x)])
        return gradient if exponents is None else torch.ldexp(gradient, -exponents.view(-1, 1, 1, 1))

    def sign_step(
        self, x: Tensor, clean: Tensor, logits_gradient: Tensor, alpha: float, eps: float, nan: Tensor
    ) -> None:
        """An L-infinity step on ``x``, see :meth:`Input.sign_step`, together with what the next pass begins with."""
        self._backward(logits_gradient)
        gradient, image = self.bound.image_gradient[: len(x)], self.bound.image[: len(x)]
        self._input.sign_step(x, clean, gradient, alpha, eps, nan, image)
        self._prepared = True

    def keep(self) -> Kept:
        """What :meth:`restore` needs to let a backward pass follow, whatever happens in between."""
        states = [segment.take() for segment in self._segments]
        return Kept(self.bound.saved.clone(), states, self.bound if states else None)

    def restore(self, saved: Tensor, segments: list[Any]) -> None:
        self.bound.saved.copy_(saved)
        for segment, state in zip(self._segments, segments, strict=True):
            segment.put(state)

    def _backward(self, logits_gradient: Tensor) -> Tensor | None:
        """To the image's slot; returns by which powers of two its gradient is too large, [n, 1], if it is."""
        bound, exponents, images = self.bound, None, len(logits_gradient)
        if bound.logits_gradient.dtype == torch.float16:
            exponents = magnifying(logits_gradient)
            logits_gradient = torch.ldexp(logits_gradient, exponents)
        bound.logits_gradient[:images].copy_(logits_gradient)
        if images < bound.rows:
            bound.logits_gradient[images:].zero_()
        _run(bound.backward)
        return exponents


def _run(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def magnifying(gradient: Tensor) -> Tensor:
    """For each row of [n, classes] the exponent of two, [n, 1], that brings its largest entry to [128, 256).

    Float16 has no numbers below 6e-8, so that the gradient of an image that the network is sure of would vanish in it.
    """
    _, exponent = torch.frexp(gradient.abs().amax(1, keepdim=True))
    return (8 - exponent).clamp_(max=LARGEST_EXPONENT)
